"""CUDA sources of losart's kernels."""
