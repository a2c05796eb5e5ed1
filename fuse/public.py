"""What users import, loaded together: ``fuse/__init__.py`` does that when torch is there or a name is asked for."""

from fuse.errors import FuseError
from fuse.inductor import inductor_configs
from fuse.library import save_library
from fuse.options import Options
from fuse.parallel.option import ContextParallel
from fuse.parallel.shards import gather_sequence, shard_sequence
from fuse.report.report import Report, explain, report, reset
from fuse.report.site import Site
from fuse.transform import Transformed, transform

__all__ = [
    "ContextParallel",
    "FuseError",
    "Options",
    "Report",
    "Site",
    "Transformed",
    "explain",
    "gather_sequence",
    "inductor_configs",
    "report",
    "reset",
    "save_library",
    "shard_sequence",
    "transform",
]
