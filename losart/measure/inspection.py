"""What a checkpoint is and what it takes to run it, without reading its weights."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from losart.backends import make_backend
from losart.config.checks import is_int
from losart.config.model import ExpertsConfig, ModelConfig
from losart.config.options import AttentionConfig, generation_config
from losart.config.precision import FLOAT32, Precision
from losart.errors import OptionError
from losart.loaders import Checkpoint
from losart.models.transformer import Transformer
from losart.quantization import is_merged, loaded_tensors

CONTEXTS = (4096, 32768)  # and all of the model's positions


def inspection(
    checkpoint: Checkpoint,
    device: str = "auto",
    dtype: str = "auto",
    contexts: Sequence[int] = (),
    weights: str = "auto",
    kv: str = "auto",
    merge: str = "dtype",
    activations: str = "auto",
) -> dict[str, Any]:
    """Facts about a checkpoint as `load` would hold it; JSON types alone.

    Parameters
    ----------
    checkpoint : Checkpoint
    device, dtype, weights, kv, merge, activations : str
        As :func:`losart.load`'s.
    contexts : sequence of int
        Lengths to compute the size of the KV cache for. Default: those of `CONTEXTS` that the model
        has, and all of its positions.

    Raises
    ------
    OptionError
        A name or a length is out of range.
    ConfigError, DeviceError
        The model does not run on the device, or there is none.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    precision = Precision.chosen(dtype, kv, checkpoint.dtype, activations)
    for context in contexts:
        if not (is_int(context) and 0 < context <= config.max_positions):
            raise OptionError(
                f"context must be 1 to the model's {config.max_positions} positions, not {context!r}"
            )
    if not contexts:
        fitting = [context for context in CONTEXTS if context < config.max_positions]
        contexts = [*fitting, config.max_positions]
    backend = make_backend(device, config, precision)
    tensors, loaded = checkpoint.tensors.values(), loaded_tensors(checkpoint, weights, backend.name, merge)
    held = Transformer.bytes_of_matrices(config, loaded, backend)
    vectors = [tensor for tensor in loaded.values() if len(tensor.shape) == 1]  # in float32

    def kv_bytes(context: int) -> int:
        return backend.new_cache(AttentionConfig.page_size, context).bytes_for(context)

    def token(number: int | None) -> dict[str, Any] | None:
        text = tokenizer.decode([number], skip_special=False) if tokenizer and number is not None else None
        return None if number is None else {"id": number, "text": text}

    merged_in = set[str]()
    for matrix in Transformer.matrices(config, loaded):
        joined = backend.held(*matrix)  # in one format, or each part in its own
        for tensor in filter(is_merged, matrix):
            merged_in.update(joined if len(joined) == 1 else backend.held(tensor))
    weight_bytes = sum(held.values()) + sum(v.shape[0] * FLOAT32.itemsize for v in vectors)
    free = backend.free_bytes()
    return {
        "path": str(checkpoint.path),
        "architecture": config.model_type,
        "base": checkpoint.base,
        "adapter": _adapter(checkpoint, sorted(merged_in)),
        "sizes": _sizes(config),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "dtype_on_disk": sorted({tensor.dtype for tensor in tensors}),
        "bytes_on_disk": sum(tensor.nbytes for tensor in tensors),
        "device": backend.name,
        "dtype": precision.weights.name,
        "weight_bytes": weight_bytes,
        "matrix_bytes": held,
        "kv": precision.kv.name,
        "activations": "fp8" if backend.float8_activations else precision.activations.name,
        "free_bytes": free,
        "fitting_positions": None if free is None else _fitting(free - weight_bytes, kv_bytes, config),
        "kv_cache": [{"context": n, "bytes": kv_bytes(n)} for n in contexts],
        "decoding": _decoding(config),
        "block_length": config.block_length,
        "mask_token": token(config.mask_token_id),
        "end_tokens": [token(number) for number in config.end_token_ids],
        "tokenizer": tokenizer is not None,
        "chat_template": checkpoint.chat_template is not None,
        "options": _default_options(config),
    }


def _fitting(room: int, kv_bytes: Callable[[int], int], config: ModelConfig) -> int | None:
    """Positions that a KV cache of so many bytes has room for; None for less than nothing."""
    if room < 0:
        return None
    return bisect_right(range(1, config.max_positions + 1), room, key=kv_bytes)


def _adapter(checkpoint: Checkpoint, merged_in: list[str]) -> dict[str, Any] | None:
    """What an adapter changes, and in which formats the matrices are held that it is merged into."""
    if checkpoint.adapter is None:
        return None
    changes = checkpoint.changes.values()
    products = [change.product for change in changes if change.product is not None]
    return {
        "path": str(checkpoint.adapter.path),
        "products": len(products),
        "ranks": sorted({product.rank for product in products}),
        "replaced": sum(change.whole is not None for change in changes),
        "rows": sum(len(change.rows.indices) for change in changes if change.rows is not None),
        "merged_in": merged_in,
    }


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "ffn": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "positions": config.max_positions,
        "rope": dataclasses.asdict(config.rope),
        "tied_embeddings": config.tie_embeddings,
        "head_norms": config.head_norms,
        "qkv_bias": config.qkv_bias,
        "o_bias": config.o_bias,
        "experts": None if config.experts is None else _experts(config.experts),
    }


def _decoding(config: ModelConfig) -> list[str]:
    """What is special about the family's decoding."""
    decoding, defaults = config.decoding, dict(config.decoding.defaults)
    said = {
        "a row predicts the next token": decoding.shifted,
        "the last row of the prompt and of each block gives the next token": decoding.seeds,
        "the prompt and finished blocks are causal": decoding.causal,
        "the last block is cut to the answer": decoding.ends_short,
        "blocks are filled part by part": "sub_block_length" in defaults,
        "fixed tokens may be changed": defaults.get("editing_threshold", 1.0) < 1,
    }
    return [text for text, holds in said.items() if holds]


def _experts(experts: ExpertsConfig) -> dict[str, Any]:
    return dataclasses.asdict(experts) | {"dense_layers": sorted(experts.dense_layers)}


def _default_options(config: ModelConfig) -> dict[str, Any] | None:
    """The defaults of `Model.generate` by name; None where an option has no default."""
    try:
        options = dataclasses.asdict(generation_config(config, {}))
    except OptionError:
        return None
    attention = options.pop("attention")
    return options | {"attention": attention.pop("method")} | attention
