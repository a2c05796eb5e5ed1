"""What users import, loaded together: ``fuse/__init__.py`` does that when torch is there or a name is asked for."""

from fuse.errors import FuseError
from fuse.inductor import inductor_configs
from fuse.library import save_library
from fuse.options import Options
from fuse.report.report import Report, explain, report, reset
from fuse.report.site import Site
from fuse.transform import Transformed, transform

__all__ = [
    "FuseError",
    "Options",
    "Report",
    "Site",
    "Transformed",
    "explain",
    "inductor_configs",
    "report",
    "reset",
    "save_library",
    "transform",
]
