"""Adapters: what PEFT's LoRA files change in a checkpoint's tensors."""

from losart.loaders.adapters.adapter import Adapter, read_adapter
from losart.loaders.adapters.change import Change, LowRank, Rows

__all__ = ["Adapter", "Change", "LowRank", "Rows", "read_adapter"]
