"""A denoising pass by transformers' Qwen3 or Qwen3-MoE, with SDPA as it comes, eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from losart.measure.random_checkpoint import FAMILY_SIZES


class TransformersPass:
    """A model of SDAR's or SDAR-MoE's sizes with random weights, made on the device.

    Parameters
    ----------
    size : str
        Of `random_checkpoint.FAMILY_SIZES`.
    device : {"cuda", "cpu"}
    dtype : str
        Of torch's.
    """

    def __init__(self, size: str, device: str = "cuda", dtype: str = "bfloat16") -> None:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

        dense = size in FAMILY_SIZES["sdar"]
        s = FAMILY_SIZES["sdar" if dense else "sdar_moe"][size]
        kinds: tuple[Any, Any] = (
            (Qwen3Config, Qwen3ForCausalLM) if dense else (Qwen3MoeConfig, Qwen3MoeForCausalLM)
        )
        of_experts = {} if dense else s["extra_config"] | {"norm_topk_prob": True}
        self.config = kinds[0](
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
            **of_experts,
        )
        self.device, self.dtype = device, getattr(torch, dtype)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(device):
                self.model = kinds[1](self.config).eval()
        finally:
            torch.set_default_dtype(usual)
        # The block's tokens see each other and the prefix. Without a mask SDPA may take flash
        # attention with grouped heads; with one, transformers would repeat every key and value.
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False

    def after(self, prefix: int, block: int, sequences: int = 1) -> Callable[[], None]:
        """A forward over a block of each sequence after a cache of noise."""
        import torch
        import transformers

        cache = self.filled_cache(prefix, sequences)
        ids = torch.arange(block, device=self.device).expand(sequences, block)
        positions = torch.arange(prefix, prefix + block, device=self.device)[None]
        # On the CPU a mask of zeros, as the committed figures have it: it costs transformers a few percent.
        shape = (1, 1, block, prefix + block)
        mask = torch.zeros(shape) if self.device == "cpu" else {"full_attention": None}
        unmasked: Any = nullcontext()
        if not isinstance(self.model, transformers.Qwen3ForCausalLM):  # which would make a mask of None
            mask, unmasked = (
                None,
                patch(f"{type(self.model).__module__}.create_causal_mask", return_value=None),
            )

        def run() -> None:
            with torch.inference_mode(), unmasked:
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
