"""Weights as codes and scales: rounding to them as they are loaded, and checkpoints that hold them."""

from losart.quantization.checkpoint import quantize_checkpoint
from losart.quantization.converted import convert_checkpoint
from losart.quantization.loading import LOADED, MERGED, loaded_tensors
from losart.quantization.merging import is_merged
from losart.quantization.rounding import WEIGHTS, RoundedTensor, WeightFormat, rounded_tensors

__all__ = [
    "LOADED",
    "MERGED",
    "WEIGHTS",
    "RoundedTensor",
    "WeightFormat",
    "convert_checkpoint",
    "is_merged",
    "loaded_tensors",
    "quantize_checkpoint",
    "rounded_tensors",
]
