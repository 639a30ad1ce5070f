"""Writes what was opened, a GGUF file or a base with an adapter, as a directory of plain safetensors."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from losart.backends.cpu.convert import float32_of, narrow
from losart.config.model import ModelConfig
from losart.config.precision import Format, Precision
from losart.errors import OptionError
from losart.loaders import Checkpoint
from losart.loaders.conversion import FILE, Conversion
from losart.loaders.families import family_of
from losart.loaders.families.ordinary import ORDINARY
from losart.loaders.families.rope import rope_keys
from losart.loaders.json_files import read_json_object
from losart.loaders.safetensors_writer import TensorEntry
from losart.observe.step import Progress
from losart.quantization.merging import merged_tensors
from losart.quantization.writing import (
    PIECE,
    Written,
    copy_others,
    incomplete,
    refuse_existing,
    write_tensors,
)

CARD = "README.md"


def convert_checkpoint(
    checkpoint: Checkpoint,
    destination: str | os.PathLike[str],
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint's directory in the manner of transformers, with all its weights in one dtype.

    Weights that are quantized are widened, and an adapter's changes merged in, in float32, before each is
    rounded once. A model of an ordinary architecture keeps it, and losart.json says which family's decoding
    it was trained for: transformers loads the directory, too.

    Parameters
    ----------
    checkpoint : Checkpoint
    destination : path
        A directory that does not exist yet.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        "auto": the checkpoint's own.
    progress : callable, optional
        Called with the MiB written and the MiB in all.

    Raises
    ------
    OptionError
        There is no such dtype.
    CheckpointError
        The destination exists.
    TensorError
        A weight is not finite.
    """
    destination = Path(destination)
    refuse_existing(destination)
    held = Precision.chosen(dtype, "auto", checkpoint.dtype).weights
    tensors = merged_tensors(checkpoint, "dtype")
    # An adapter may replace the embedding and not the head that was one with it.
    config = replace(checkpoint.config, tie_embeddings="head" not in tensors, dtype=held.name)
    family = family_of(config.model_type) if checkpoint.base is None else ORDINARY[checkpoint.base]
    written = [
        _written(tensors[expected.name], expected.source, held)
        for expected in family.expected_tensors(config)
    ]
    with incomplete(destination) as directory:
        if checkpoint.path.is_dir():
            copy_others(checkpoint.path, directory)
            keys = read_json_object(checkpoint.path / "config.json").values
            keys.pop("quantization_config", None)
            keys.pop("dtype", None)
            keys |= {"tie_word_embeddings": config.tie_embeddings, "torch_dtype": held.name}
        else:
            keys = _keys(config, checkpoint.base)
            _write_json(directory / "generation_config.json", {"eos_token_id": list(config.end_token_ids)})
            _write_tokenizer(checkpoint, directory)
        if checkpoint.adapter is not None and (checkpoint.adapter.path / CARD).exists():
            shutil.copyfile(checkpoint.adapter.path / CARD, directory / CARD)
        _write_json(directory / "config.json", keys)
        if checkpoint.base is not None:
            _write_json(directory / FILE, Conversion.within(config, directory / FILE).json)
        write_tensors(directory, written, progress)
    return destination


def _written(tensor: Any, name: str, held: Format) -> Written:
    entry, rows = TensorEntry(name, held.safetensors, tensor.shape, held.itemsize), tensor.shape[0]

    def values(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return (narrow(float32_of(tensor, start, stop, threads=False), held),)

    step = max(1, PIECE * rows // max(1, math.prod(tensor.shape)))
    return Written((entry,), rows, step, values, entry.nbytes, tensor.release)


def _keys(config: ModelConfig, base: str | None) -> dict[str, Any]:
    """Of config.json, for one of the ordinary architectures."""
    if base is None:
        raise OptionError(f"{config.model_type}: only a directory of this family can be converted")
    return {
        "architectures": [ORDINARY[base].architectures[0]],
        "model_type": base,
        "attention_bias": config.o_bias if base == "llama" else config.qkv_bias,
        "eos_token_id": list(config.end_token_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "vocab_size": config.vocab_size,
        **rope_keys(config.rope),
    }


def _write_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    tokenizer, template = checkpoint.tokenizer, checkpoint.chat_template
    if tokenizer is not None:
        tokenizer.backend.save(str(directory / "tokenizer.json"))
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write_json(directory / "tokenizer_config.json", kind | dict(tokenizer.special_tokens))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
