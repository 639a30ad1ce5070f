"""A checkpoint, opened and verified: the entry point of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from losart.config.model import ModelConfig
from losart.config.precision import DTYPES
from losart.errors import TensorError
from losart.loaders.adapters import Adapter, Change, read_adapter
from losart.loaders.chat_template import ChatTemplate, read_chat_template
from losart.loaders.conversion import read_conversion
from losart.loaders.families import Family
from losart.loaders.families.ordinary import ORDINARY
from losart.loaders.gguf import open_gguf
from losart.loaders.hub import checkpoint_directory, gguf_file
from losart.loaders.json_files import read_json_object
from losart.loaders.model_config import read_family
from losart.loaders.quantized import Quantization, QuantizedTensor, read_quantization
from losart.loaders.safetensors_files import MappedTensor, map_tensors
from losart.loaders.tokenizer import Tokenizer, read_tokenizer

_NAMES_IN_AN_ERROR = 3


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors have been checked against its configuration.

    Attributes
    ----------
    path : Path
        Its directory, or its GGUF file.
    config : ModelConfig
    tensors : dict of str to MappedTensor, QuantizedTensor or WideTensor
        By canonical name (see `losart.loaders.families`); mapped, not read.
    tokenizer : Tokenizer or None
        None where the checkpoint has none.
    chat_template : ChatTemplate or None
        None where the checkpoint has none.
    adapter : Adapter or None
    changes : dict of str to Change
        What the adapter changes, by canonical name. `tensors` are the base's.
    base : str or None
        The ordinary architecture, as transformers calls it, of which a family was made.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, Any] = field(repr=False)
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    adapter: Adapter | None = None
    changes: dict[str, Change] = field(default_factory=dict, repr=False)
    base: str | None = None

    @property
    def dtype(self) -> str:
        """Of the saved weights: the configuration's, else the embedding's."""
        return self.config.dtype or self.tensors["embed"].dtype


def open_checkpoint(
    model: str | os.PathLike[str] | None = None, adapter: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Open a checkpoint, and perhaps an adapter, without reading their weights.

    Parameters
    ----------
    model : str or path, optional
        A directory, a GGUF file, or a hub id ("org/name"); by default, the small checkpoint that comes with
        losart.
    adapter : str or path, optional
        A directory, or a hub id, of a LoRA as PEFT writes it.

    Raises
    ------
    CheckpointError
        If the directory or a file is missing, unreadable or corrupt.
    ConfigError
        If the configuration is impossible or not supported.
    TensorError
        If a tensor is missing, unknown, or of the wrong shape or dtype.
    """
    lora = None if adapter is None else read_adapter(adapter)
    conversion = None if lora is None else lora.conversion
    file = gguf_file(model)
    if file is not None:
        config, family, held, tokenizer, template = open_gguf(file, conversion)
        changes = _changes(lora, family, config)
        return Checkpoint(file, config, held, tokenizer, template, lora, changes, _base(family))
    directory = checkpoint_directory(model)
    tokenizer = read_tokenizer(directory)
    config, family = read_family(directory, tokenizer, conversion or read_conversion(directory))
    quantization = read_quantization(read_json_object(directory / "config.json"))
    tensors = _canonical_tensors(directory, config, family, map_tensors(directory), quantization)
    config = config if family.refined is None else family.refined(config, tensors)
    special_tokens = {} if tokenizer is None else tokenizer.special_tokens
    template = read_chat_template(directory, special_tokens)
    changes = _changes(lora, family, config)
    return Checkpoint(directory, config, tensors, tokenizer, template, lora, changes, _base(family))


def _base(family: Family) -> str | None:
    return next((name for name, ordinary in ORDINARY.items() if ordinary is family), None)


def _changes(lora: Adapter | None, family: Family, config: ModelConfig) -> dict[str, Change]:
    return {} if lora is None else lora.changes(family.named(config), config.tie_embeddings)


def _canonical_tensors(
    directory: Path,
    config: ModelConfig,
    family: Family,
    saved: Mapping[str, MappedTensor],
    quantization: Quantization | None,
) -> dict[str, MappedTensor | QuantizedTensor]:
    tensors: dict[str, MappedTensor | QuantizedTensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for expected in family.expected_tensors(config):
        # An embedding's rows are looked up one by one: it must be as it is.
        if quantization is not None and len(expected.shape) == 2 and expected.name != "embed":
            quantized = quantization.find(expected.source, expected.shape, saved)
            if quantized is not None:
                tensors[expected.name] = quantized
                used.update(part.name for part in quantized.parts.values())
                continue
        tensor = saved.get(expected.source)
        if tensor is None:
            missing.append(expected.source)
            # A configuration may claim billions of layers: a few names are enough.
            if len(missing) > _NAMES_IN_AN_ERROR:
                break
            continue
        if tensor.shape != expected.shape:
            raise TensorError(
                f"{tensor.file}: tensor {tensor.name!r} has the shape {list(tensor.shape)}; "
                f"config.json asks for {list(expected.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise TensorError(
                f"{tensor.file}: tensor {tensor.name!r} has the dtype {tensor.dtype}; "
                f"supported: {', '.join(DTYPES)}"
            )
        tensors[expected.name] = tensor
        used.add(tensor.name)
    if missing:
        raise TensorError(f"{directory}: missing tensors: {_names(missing)}")

    def is_harmless(name: str) -> bool:
        patterns = quantization.harmless if quantization is not None else ()
        return family.is_harmless(name, config) or any(fnmatchcase(name, pattern) for pattern in patterns)

    unknown = [name for name in saved if name not in used and not is_harmless(name)]
    if unknown:
        raise TensorError(f"{directory}: unknown tensors: {_names(unknown)}")
    return tensors


def _names(names: list[str]) -> str:
    shown = [repr(name) for name in names[:_NAMES_IN_AN_ERROR]]
    return ", ".join(shown + ["..."] * (len(names) > _NAMES_IN_AN_ERROR))
