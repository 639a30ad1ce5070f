"""The CPU backend, and the Cython modules of the host."""
