"""C++ kernels for CPUs. NAME is the target's, and its folder's in the cache; SUFFIX that of its sources."""

NAME, SUFFIX = "cpp", ".cpp"
