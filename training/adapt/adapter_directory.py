"""What was trained as a LoRA in PEFT's format, which losart adds to the base when it loads that.

Beside the products of low rank it has the norms, whole, and the mask token's vector in place of its
embedding. losart.json says of which family the base becomes one.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from losart.errors import OptionError
from losart.loaders.conversion import FILE

from .base_model import Base
from .checkpoint_directory import write_conversion, write_json
from .decoder import BIASES, MATRICES, NORMS, Shape, Weights
from .family import Family
from .low_rank import BYTES

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_HEADER = 200  # bytes of the file for each tensor's name and place, about

Products = dict[str, list[tuple[Tensor, Tensor]]]


def room_for_products(shape: Shape, size: int) -> int:
    """Bytes that an adapter of a size has left for products."""
    norms = (len(NORMS) * shape.layers + 1) * shape.hidden
    tensors = 2 * len(MATRICES) * shape.layers + len(NORMS) * shape.layers + 2
    return size - BYTES * (norms + shape.hidden) - _HEADER * tensors


def write_adapter(
    directory: Path,
    base: Base,
    original: Weights,
    weights: Weights,
    found: Products,
    family: Family,
    block_length: int,
    mask_id: int,
    threshold: float,
    base_name: str,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors in bfloat16, and losart.json.

    Parameters
    ----------
    directory : Path
        Made if need be.
    base : Base
    original, weights : dict
        The base's, and what training made of them, of which norms and the mask's vector are written.
    found : dict
        Of `low_rank.products`.
    family : Family
    block_length, mask_id : int
    threshold : float
        Of the confidence at which decoding fixes a token, by default.
    base_name : str
        The base, as adapter_config.json names it.
    """
    shape = base.shape
    if any((weights[kind] != original[kind]).any() for kind in BIASES if shape.qkv_bias):
        raise OptionError("a LoRA has no place for the biases that training changed: write a checkpoint")
    directory.mkdir(parents=True, exist_ok=True)
    ranks = {
        f"model.layers.{i}.{MATRICES[kind]}": a.shape[0]
        for kind, of_kind in found.items()
        for i, (a, _) in enumerate(of_kind)
    }
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != usual}
    norms = [kind for kind in shape.layer_tensors if kind.endswith("norm")]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,  # so that every product counts by 1
        "target_modules": [MATRICES[kind].rpartition(".")[2] for kind in found],
        "modules_to_save": [
            *(shape.layer_tensors[kind].removesuffix(".weight").rpartition(".")[2] for kind in norms),
            "model.norm",
        ],
        "trainable_token_indices": {"embed_tokens": [mask_id]},
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }
    write_json(directory / CONFIG, config)
    write_conversion(directory, family, block_length, mask_id, threshold)
    tensors = {
        f"{PREFIX}model.norm.weight": weights["final_norm"],
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": weights["mask"][None],
    }
    for kind in norms:
        name = shape.layer_tensors[kind]
        tensors |= {f"{PREFIX}model.layers.{i}.{name}": value for i, value in enumerate(weights[kind])}
    for kind, of_kind in found.items():
        for i, (a, b) in enumerate(of_kind):
            module = f"{PREFIX}model.layers.{i}.{MATRICES[kind]}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    saved = {name: value.detach().cpu().to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(saved, str(directory / TENSORS), {"format": "pt"})


def read_adapter(directory: Path, base: Base, weights: Weights) -> tuple[Weights, str, int, int]:
    """The base's weights with an adapter that `write_adapter` wrote added to them.

    Returns
    -------
    weights : dict
        With the mask's vector.
    family : str
    block_length, mask_id : int
    """
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    conversion = json.loads((directory / FILE).read_text(encoding="utf-8"))
    saved = {
        name.removeprefix(PREFIX): value.to(weights["embed"])
        for name, value in load_file(str(directory / TENSORS)).items()
    }
    shape, made = base.shape, dict(weights)
    made["final_norm"] = saved["model.norm.weight"]
    made["mask"] = saved["model.embed_tokens.token_adapter.trainable_tokens_delta"][0]
    for kind, name in shape.layer_tensors.items():
        if kind.endswith("norm"):
            made[kind] = torch.stack([saved[f"model.layers.{i}.{name}"] for i in range(shape.layers)])
    targets = set(config["target_modules"])
    for kind, name in MATRICES.items():
        if name.rpartition(".")[2] in targets:
            modules = [f"model.layers.{i}.{name}" for i in range(shape.layers)]
            changes = [saved[f"{one}.lora_B.weight"] @ saved[f"{one}.lora_A.weight"] for one in modules]
            made[kind] = weights[kind] + torch.stack(changes)
    return made, conversion["family"], conversion["block_length"], conversion["mask_token_id"]
