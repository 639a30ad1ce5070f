"""Torch's attention, for the rows beside ours. Importing torch takes seconds: done when a row is measured."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from losart.config.model import ModelConfig


def flash_over_prefix(config: ModelConfig, block: int, prefix: int) -> float:
    """Microseconds of a layer's flash attention over the prefix, a group's query heads as rows."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kv, layers = config.num_kv_heads, config.num_layers
    q = _noise(1, kv, block * config.group_size, config.head_dim)
    k, v = ([_noise(1, kv, prefix, config.head_dim) for _ in range(layers)] for _ in range(2))
    turn = itertools.cycle(range(layers))
    calls = max(8, layers)

    def attend() -> Any:
        layer = next(turn)
        return torch.nn.functional.scaled_dot_product_attention(q, k[layer], v[layer])

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for _ in range(3):
            attend()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                attend()
    return run_microseconds(graph.replay, warmups=0, repeats=15) / calls


def causal(config: ModelConfig, prompt: int, kind: str) -> float:
    """Microseconds of a layer's causal attention over a whole prompt by "flash" or "cudnn"."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[kind]
    q = _noise(1, config.num_heads, prompt, config.head_dim)
    k, v = (_noise(1, config.num_kv_heads, prompt, config.head_dim) for _ in range(2))
    grouped = {"enable_gqa": True}

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)

    with sdpa_kernel(backend):
        try:
            attend()
        except RuntimeError:  # no kernel for grouped heads
            k, v = (x.repeat_interleave(config.group_size, dim=1) for x in (k, v))
            grouped = {}
        return run_microseconds(attend)


def run_microseconds(run: Callable[[], object], warmups: int = 3, repeats: int = 10) -> float:
    """Median microseconds of a run, on torch's stream."""
    import torch

    times = []
    for _ in range(warmups + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[warmups:])


def _noise(*shape: int) -> Any:
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
