"""Checkpoints in SDAR's format with random weights, of any size, written in flat memory.

For measuring and for tests.
"""

from losart.measure.random_checkpoint.tensors import DTYPE_NAMES
from losart.measure.random_checkpoint.writer import SIZES, write_checkpoint, write_size

__all__ = ["DTYPE_NAMES", "SIZES", "write_checkpoint", "write_size"]
