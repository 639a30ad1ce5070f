"""A denoising pass by transformers' Qwen3, with SDPA as it comes, eager."""

from __future__ import annotations

from typing import Any

from benchmarks.cuda.torch_attention import run_microseconds
from losart.measure.random_checkpoint import SIZES


class TransformersPass:
    """A model of SDAR's sizes with random bfloat16 weights, made on the device.

    Parameters
    ----------
    size : str
        Of `random_checkpoint.SIZES`, or a dict like one of its.
    device : str
    """

    def __init__(self, size: str | dict[str, Any], device: str = "cuda") -> None:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        s = SIZES[size] if isinstance(size, str) else size
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
        self.device = device
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                self.model = Qwen3ForCausalLM(self.config).eval()
        finally:
            torch.set_default_dtype(usual)
        # The block's tokens see each other and the prefix. Without a mask SDPA may take flash
        # attention with grouped heads; with one, transformers would repeat every key and value.
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False

    def milliseconds(self, prefix: int, block: int = 16) -> float:
        """Median milliseconds of a forward over a block after a cache of noise."""
        import torch

        cache = self.filled_cache(prefix)
        ids = torch.arange(block, device=self.device)[None]

        def run() -> None:
            self.forward(ids, cache)
            cache.crop(-block)

        with torch.inference_mode():
            return run_microseconds(run) / 1e3

    def filled_cache(self, prefix: int) -> Any:
        """A DynamicCache of so many random positions."""
        import torch
        from transformers import DynamicCache

        c, cache = self.config, DynamicCache()
        shape = (1, c.num_key_value_heads, prefix, c.head_dim)
        for layer in range(c.num_hidden_layers):
            k, v = (torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(2))
            cache.update(k, v, layer)
        return cache

    def forward(self, ids: Any, cache: Any) -> Any:
        """Logits of the block after the cache, to which it is added."""
        import torch

        start = cache.get_seq_length()
        positions = torch.arange(start, start + ids.shape[1], device=self.device)[None]
        no_mask = {"full_attention": None}
        return self.model(
            ids, attention_mask=no_mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
