"""The language between what finds attention and what generates kernels; it knows nothing of graphs or targets."""

from fuse.ir import rules  # noqa: F401  expressions are built by them
