"""One call by eager PyTorch, Inductor and fuse, side by side: time, memory, error, first call."""

from fuse.bench.case import Case, Failed, Measured
from fuse.bench.ways import WAYS, Comparison, Ways

__all__ = ["WAYS", "Case", "Comparison", "Failed", "Measured", "Ways"]
