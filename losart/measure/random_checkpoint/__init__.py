"""Checkpoints with random weights in SDAR's format, for benchmarks and tests.

Of any size, and written with little memory.
"""

from losart.measure.random_checkpoint.writer import SIZES, write_checkpoint, write_size

__all__ = ["SIZES", "write_checkpoint", "write_size"]
