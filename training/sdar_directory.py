"""What was trained as an ordinary SDAR directory: written, and read to train on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_sdar import ModelShape, SmallSdar
from torch import Tensor

from losart.errors import ConfigError
from losart.loaders import open_checkpoint
from losart.loaders.json_files import read_json_object


def write_checkpoint(model: SmallSdar, directory: Path, special: dict[str, int], block_length: int) -> None:
    """Write config.json, generation_config.json and the weights in bfloat16.

    Parameters
    ----------
    model : SmallSdar
    directory : Path
        Made if need be.
    special : dict
        Ids of `mask`, `end` and `pad`.
    block_length : int
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokens = {"eos_token_id": special["end"], "pad_token_id": special["pad"]}
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        **asdict(model.shape),
        **tokens,
        "mask_token_id": special["mask"],
        "block_size": block_length,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", tokens)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, str(directory / "model.safetensors"), {"format": "pt"})


def read_weights(directory: Path, shape: ModelShape) -> dict[str, Tensor]:
    """The state dict, in bfloat16, that `write_checkpoint` wrote.

    Parameters
    ----------
    directory : Path
    shape : ModelShape
        Of the model that is to have the weights.

    Raises
    ------
    ConfigError
        If config.json names other sizes.
    CheckpointError
        If a file is missing or corrupt, or its tensors are others.
    """
    config = read_json_object(directory / "config.json")
    for name, wanted in asdict(shape).items():
        found = config.get(name)
        if found != wanted:
            raise ConfigError(f"{config.file}: {name} is {found!r}; the training has {wanted!r}")
    weights = {}
    for tensor in open_checkpoint(directory).tensors.values():  # those that config.json asks for
        with safe_open(tensor.file, framework="pt") as file:
            weights[tensor.name] = file.get_tensor(tensor.name)
    return weights


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
