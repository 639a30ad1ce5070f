"""What a model card says of a training: training.json."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from schedule import TASK_WEIGHTS
from trainer import Trainer


def write_summary(trainer: Trainer, file: Path) -> None:
    """Write with what, how long and how far a model was trained.

    `first_step` is null for stages that have not begun, `commit` where there is no git repository.
    """
    state, device = trainer.state, trainer.device
    first_steps = [*state.began, *[None] * (len(trainer.stages) - len(state.began))]
    summary: dict[str, Any] = {
        "start": state.start,
        "seed": trainer.seed,
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "minutes": trainer.seconds / 60,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "peak_rate": trainer.peak,
        "page_bound": trainer.page_bound,
        "tasks": TASK_WEIGHTS,
        "stages": [
            {**asdict(stage), "first_step": step}
            for stage, step in zip(trainer.stages, first_steps, strict=True)
        ],
        "recall": trainer.recall(),
    }
    file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """Of this file's repository, `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
