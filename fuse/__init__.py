"""fuse: the attention in your model, whatever its spelling, as one generated kernel.

``torch.compile(model, backend="fuse")`` needs no import of this package; what is here is for looking inside.
"""

from fuse.errors import FuseError
from fuse.inductor import inductor_configs
from fuse.options import Options
from fuse.report.report import Report, explain, report, reset
from fuse.report.site import Site
from fuse.trainer import make_known
from fuse.transform import Transformed, transform

make_known()

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
    "transform",
]
