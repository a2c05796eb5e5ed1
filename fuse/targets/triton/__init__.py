"""Triton kernels for GPUs. NAME is the target's, and its folder's in the cache; SUFFIX that of its sources."""

NAME, SUFFIX = "triton", ".py"
