"""A denoising pass by transformers' Qwen3, with SDPA as it comes, eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from losart.measure.random_checkpoint import SIZES


class TransformersPass:
    """A model of SDAR's sizes with random weights, made on the device.

    Parameters
    ----------
    size : str
        Of `random_checkpoint.SIZES`.
    device : {"cuda", "cpu"}
    dtype : str
        Of torch's.
    """

    def __init__(self, size: str, device: str = "cuda", dtype: str = "bfloat16") -> None:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        s = SIZES[size]
        self.config = Qwen3Config(
            vocab_size=s["vocab_size"],
            hidden_size=s["hidden_size"],
            intermediate_size=s["intermediate_size"],
            num_hidden_layers=s["num_layers"],
            num_attention_heads=s["num_heads"],
            num_key_value_heads=s["num_kv_heads"],
            head_dim=s["head_dim"],
            max_position_embeddings=262144,
            tie_word_embeddings=s.get("tied", False),
            attn_implementation="sdpa",
        )
        self.device, self.dtype = device, getattr(torch, dtype)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(device):
                self.model = Qwen3ForCausalLM(self.config).eval()
        finally:
            torch.set_default_dtype(usual)
        # The block's tokens see each other and the prefix. Without a mask SDPA may take flash
        # attention with grouped heads; with one, transformers would repeat every key and value.
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False

    def after(self, prefix: int, block: int, sequences: int = 1) -> Callable[[], None]:
        """A forward over a block of each sequence after a cache of noise."""
        import torch

        cache = self.filled_cache(prefix, sequences)
        ids = torch.arange(block, device=self.device).expand(sequences, block)
        positions = torch.arange(prefix, prefix + block, device=self.device)[None]
        # On the CPU a mask of zeros, as the committed figures have it: it costs transformers a few percent.
        shape = (1, 1, block, prefix + block)
        mask = torch.zeros(shape) if self.device == "cpu" else {"full_attention": None}

        def run() -> None:
            with torch.inference_mode():
                self.model(
                    ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
            cache.crop(-block)

        return run

    def filled_cache(self, prefix: int, sequences: int = 1) -> Any:
        """A DynamicCache of so many random positions of each sequence."""
        import torch
        from transformers import DynamicCache

        c, cache = self.config, DynamicCache()
        shape = (sequences, c.num_key_value_heads, prefix, c.head_dim)
        for layer in range(c.num_hidden_layers):
            k, v = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
            cache.update(k, v, layer)
        return cache
