"""Weights as codes and scales: rounding to them, and checkpoints that hold them."""

from losart.quantization.checkpoint import quantize_checkpoint
from losart.quantization.rounding import WEIGHTS, RoundedTensor, WeightFormat

__all__ = ["WEIGHTS", "RoundedTensor", "WeightFormat", "quantize_checkpoint"]
