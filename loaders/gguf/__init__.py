"""GGUF files (github.com/ggml-org/ggml, docs/gguf.md) of Llama, Qwen2 and Qwen3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from losart.config.model import ModelConfig
from losart.config.precision import DTYPES
from losart.errors import TensorError
from losart.loaders.chat_template import ChatTemplate
from losart.loaders.conversion import Conversion
from losart.loaders.families.family import Family
from losart.loaders.families.ordinary import ORDINARY
from losart.loaders.gguf.config import FREQUENCIES, gguf_family, read_config
from losart.loaders.gguf.reader import read_gguf
from losart.loaders.gguf.tensors import BlockTensor, WideTensor, tensor_of
from losart.loaders.gguf.tokenizer import read_chat_template, read_tokenizer
from losart.loaders.safetensors_files import MappedTensor
from losart.loaders.tokenizer import Tokenizer

_NAMES_IN_AN_ERROR = 3
Parts = tuple[ModelConfig, Family, dict[str, Any], Tokenizer | None, ChatTemplate | None]


def open_gguf(file: Path, conversion: Conversion | None) -> Parts:
    """A file's configuration, its family as transformers names tensors, its tensors, tokenizer and template.

    Parameters
    ----------
    file : Path
    conversion : Conversion or None
        An adapter's, where the file itself says nothing of blocks.

    Raises
    ------
    CheckpointError
        The file is missing, truncated or corrupt.
    ConfigError
        Its metadata are impossible or not supported, or nothing says that it fills in blocks.
    TensorError
        A tensor is missing, unknown, or of the wrong shape or type.
    """
    metadata, saved = read_gguf(file)
    config, architecture = read_config(metadata, saved, conversion)
    tokenizer = read_tokenizer(metadata)
    template = read_chat_template(metadata, {} if tokenizer is None else tokenizer.special_tokens)
    family = gguf_family(architecture)
    tensors = _tensors(file, config, family, saved, permuted=architecture == "llama")
    return config, ORDINARY[architecture], tensors, tokenizer, template


def _tensors(
    file: Path, config: ModelConfig, family: Family, saved: dict[str, MappedTensor], permuted: bool
) -> dict[str, Any]:
    """By canonical name; `permuted`: whether the channels of queries and keys are in pairs."""
    tensors: dict[str, Any] = {}
    left, missing = dict(saved), list[str]()
    left.pop(FREQUENCIES, None)
    for expected in family.expected_tensors(config):
        raw = left.pop(expected.source, None)
        if raw is None:
            missing.append(expected.source)
            # Metadata may claim billions of layers: a few names are enough.
            if len(missing) > _NAMES_IN_AN_ERROR:
                break
            continue
        where = f"{file}: tensor {raw.name!r}"
        if raw.shape != expected.shape:
            raise TensorError(
                f"{where} has the shape {list(raw.shape)}; the metadata ask for {list(expected.shape)}"
            )
        order = None
        if permuted and expected.name.rpartition(".")[2] in ("q", "k", "q_bias", "k_bias"):
            order = _order(raw.shape[0], config.head_dim)
        if len(raw.shape) == 1 and raw.dtype not in DTYPES:
            raise TensorError(f"{where} is a vector in {raw.dtype}, which is not supported")
        tensors[expected.name] = tensor_of(raw, order, looked_up=expected.name == "embed")
    if missing:
        raise TensorError(f"{file}: missing tensors: {_listed(missing)}")
    if left:
        raise TensorError(f"{file}: unknown tensors: {_listed(list(left))}")
    return tensors


def _order(rows: int, head_dim: int) -> np.ndarray:
    """The file's row of each row: it has channels side by side that are rotated together."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _listed(names: list[str]) -> str:
    shown = [repr(name) for name in names[:_NAMES_IN_AN_ERROR]]
    return ", ".join(shown + ["..."] * (len(names) > _NAMES_IN_AN_ERROR))


__all__ = ["BlockTensor", "WideTensor", "open_gguf"]
