"""LoRA adapters, written as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "inference_mode": True,
    "modules_to_save": None,
    "base_model_name_or_path": "somebody/something",
}
Tensors = dict[str, np.ndarray]


def products(
    base: Path, ends: Mapping[str, int], seed: int = 0, std: float = 0.1, dtype: Any = np.float32
) -> Tensors:
    """Random A and B for all matrices of a float32 checkpoint whose names end so, of such ranks."""
    rng, tensors = np.random.default_rng(seed), Tensors()
    for name, values in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        rank = next((rank for end, rank in ends.items() if module.endswith(end)), None)
        if rank is not None and values.ndim == 2:
            out, inner = values.shape
            a, b = rng.normal(0, std, (rank, inner)), rng.normal(0, std, (out, rank))
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.astype(dtype)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b.astype(dtype)
    return tensors


def write_adapter(directory: Path, tensors: Tensors, **config: Any) -> Path:
    """The directory of an adapter; keys whose value is `...` are left out of its configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    modules = {name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors if ".lora_" in name}
    ends = {"target_modules": sorted({module.rpartition(".")[2] for module in modules})}
    keys = {name: value for name, value in (CONFIG | ends | config).items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(keys))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory
