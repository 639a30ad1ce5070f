"""Checkpoints with random weights, of every family, for benchmarks and tests.

Of any size, and written with little memory.
"""

from losart.measure.random_checkpoint.families import FAMILY_SIZES, SIZES
from losart.measure.random_checkpoint.writer import write_checkpoint, write_size

__all__ = ["FAMILY_SIZES", "SIZES", "write_checkpoint", "write_size"]
