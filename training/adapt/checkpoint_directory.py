"""What was trained as a checkpoint of a block-diffusion family, all weights in bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from losart.loaders.conversion import FILE, Conversion

from .base_model import Base
from .decoder import BIASES, Weights
from .family import FAST_DLLM, Family

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def write_checkpoint(
    directory: Path,
    base: Base,
    weights: Weights,
    family: Family,
    block_length: int,
    mask_id: int,
    threshold: float,
) -> None:
    """Write config.json, generation_config.json, losart.json, the tokenizer and the weights.

    Parameters
    ----------
    directory : Path
        Made if need be.
    base : Base
    weights : dict
        The mask's vector becomes the mask token's embedding.
    family : Family
    block_length, mask_id : int
    threshold : float
        Of the confidence at which decoding fixes a token, by default.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = dict(base.config.values)
    for key in ("quantization_config", "auto_map", "dtype"):
        config.pop(key, None)
    ends = {"eos_token_id": base.end_id, "mask_token_id": mask_id}
    config |= ends | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.block_key: block_length,
        "torch_dtype": "bfloat16",
    }
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", ends)
    write_conversion(directory, family, block_length, mask_id, threshold)
    copy_tokenizer(base, directory)
    tensors = named_tensors(base, weights, mask_id, biases=family is FAST_DLLM)
    save_file(tensors, str(directory / "model.safetensors"), {"format": "pt"})


def named_tensors(base: Base, weights: Weights, mask_id: int, biases: bool) -> dict[str, Tensor]:
    """A family's tensors by their names in its files, in bfloat16; `biases`: with those of q, k and v."""
    shape = base.shape
    embedding = weights["embed"].clone()
    embedding[mask_id] = weights["mask"].to(embedding.dtype)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": weights["final_norm"]}
    if not shape.tied:
        tensors["lm_head.weight"] = weights["head"]
    for kind, name in shape.layer_tensors.items():
        tensors |= {f"model.layers.{i}.{name}": value for i, value in enumerate(weights[kind])}
    for kind, name in BIASES.items() if biases and not shape.qkv_bias else ():
        zeros = torch.zeros(weights[kind[0]].shape[1])
        tensors |= {f"model.layers.{i}.{name}.bias": zeros for i in range(shape.layers)}
    return {name: value.detach().cpu().to(torch.bfloat16).contiguous() for name, value in tensors.items()}


def copy_tokenizer(base: Base, directory: Path) -> None:
    """The base's files of its tokenizer and chat template."""
    for name in TOKENIZER_FILES:
        if (base.directory / name).exists():
            shutil.copyfile(base.directory / name, directory / name)


def write_conversion(
    directory: Path, family: Family, block_length: int, mask_id: int, threshold: float
) -> None:
    """Write losart.json, which says how the model decodes."""
    options = (("remasking", "low_confidence_dynamic"), ("confidence_threshold", threshold))
    file = directory / FILE
    write_json(file, Conversion(file, family.name, block_length, mask_id, options).json)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write an object."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
