"""A training's directory: what was planned, and the weights that came out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from losart.errors import CheckpointError

from .base_model import Base
from .decoder import Weights
from .trainable import Lora, Trainable, detached
from .trainer import Trainer


def read_run(directory: Path, base: Base, weights: Weights) -> tuple[Weights, dict[str, Any]]:
    """Weights that a training came to, float32, and its plan.

    Raises
    ------
    CheckpointError
        There is no training.pt.
    """
    file = directory / "training.pt"
    if not file.exists():
        raise CheckpointError(f"{directory}: there is no training.pt")
    saved = torch.load(file, map_location=weights["embed"].device, weights_only=True)
    plan = json.loads(saved["plan"])
    lora = None if plan["lora"] is None else Lora(**plan["lora"])
    trained = Trainable(base.shape, weights, lora)
    with torch.no_grad():
        for name, value in saved["parameters"].items():
            trained.parameters[name].copy_(value)
    return detached(trained.weights(torch.float32)), plan


def write_summary(trainer: Trainer, base: Base, start: Path | None) -> None:
    """Write training.json: the plan, how far it came, on what; and the same of the training it began with."""
    device = trainer.device
    began = (
        {"directory": str(start), **_summary(start)} if start else _summary(trainer.directory).get("start")
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    summary = {
        "base": str(base.directory),
        "start": began,
        "plan": asdict(trainer.plan),
        "stages": [asdict(stage) for stage in trainer.stages],
        **asdict(trainer.state),
        "device": name,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "torch": torch.__version__,
    }
    file = trainer.directory / "training.json"
    file.write_text(json.dumps(summary, indent=2, default=dict) + "\n", encoding="utf-8")


def _summary(directory: Path) -> dict[str, Any]:
    file = directory / "training.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def add_figures(directory: Path, figures: dict[str, Any]) -> None:
    """Write figures.json, or add to it."""
    file = directory / "figures.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(known | figures, indent=2) + "\n", encoding="utf-8")
