"""fuse: the attention in your model, whatever its spelling, as one generated kernel.

``torch.compile(model, backend="fuse")`` needs no import of this package; what is here is for looking inside.
"""

from fuse.errors import FuseError
from fuse.options import Options
from fuse.report.report import Report, explain, report, reset
from fuse.report.site import Site

__all__ = ["FuseError", "Options", "Report", "Site", "explain", "report", "reset"]
