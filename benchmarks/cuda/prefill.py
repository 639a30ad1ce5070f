"""Block-causal attention of a prompt, beside torch's causal attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.cuda.noise import BFLOAT16, BLOCK, filled_cache, model_config, placed_queries
from benchmarks.cuda.timing import graph_microseconds
from benchmarks.cuda.torch_attention import causal
from benchmarks.support.attempts import attempt, ratio, teraflops
from losart.backends.cuda.backend import CudaBackend
from losart.config.model import ModelConfig
from losart.engine.batch import PassKind


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per prompt, one layer of SDAR-8B's heads; speeds in TFLOP/s of what each side must do."""
    config = model_config("8B", num_layers=1)
    for prompt in (16384,) if quick else (16384, 65536):
        of_pair = 4 * config.head_dim * config.num_heads
        whole_blocks = of_pair * sum((p // BLOCK + 1) * BLOCK for p in range(prompt))
        ours = teraflops(whole_blocks, attempt(microseconds, config, prompt))
        triangle = of_pair * prompt * (prompt + 1) // 2
        flash, cudnn = (
            teraflops(triangle, attempt(causal, config, prompt, kind)) for kind in ("flash", "cudnn")
        )
        yield {
            "prompt": prompt,
            "losart": ours,
            "torch flash": flash,
            "losart/flash": ratio(ours, flash),
            "torch cuDNN": cudnn,
            "losart/cuDNN": ratio(ours, cudnn),
        }


def microseconds(config: ModelConfig, prompt: int) -> float:
    """Of one layer, in the pieces in which a prompt goes through the model."""
    backend = CudaBackend(config, BFLOAT16)
    cache = filled_cache(backend, 0, prompt)
    piece, total = min(backend.prefill_tokens, prompt), 0.0
    for start in range(0, prompt, piece):
        cache.length = start
        q, batch = placed_queries(backend, cache, min(piece, prompt - start), PassKind.PREFILL)
        attend = partial(backend.causal_attention, 0, q, batch)
        total += graph_microseconds(backend.memory.stream, attend, 3, 5)
    return total
