"""Trains the checkpoint that comes with losart: `python training/train.py OUT`.

Goes on from OUT/training.pt where there is one. Rows and masks follow from the seed and the step, the
learning rate from the share of `--minutes` that is over.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import recall_rows
import torch
from recall_losses import RETRIEVAL_LAYER, copy_loss, look_back_loss, masked_cross_entropy
from row_layout import Layout
from schedule import STAGES, Stage, auxiliary_weight, learning_rate
from sdar_directory import write_checkpoint
from small_sdar import ModelShape, SmallSdar
from torch import Tensor

from losart.eval.vocabulary import VOCABULARY_SIZE, write_tokenizer

LOOK_BACK = (1, 2, 3, 15, 16, 17)  # an answer's token stands 16 after its question's


@dataclass
class State:
    """How far training is."""

    step: int = 0
    stage: int = 0
    seconds: float = 0.0
    recall: list[float] = field(default_factory=list)  # of each stage, running median of the tasks


class Trainer:
    """Model, optimizer, state, and the files that they are kept in.

    Parameters
    ----------
    directory : Path
        Gets training.pt and log.jsonl.
    stages : sequence of Stage
    minutes : float
        Of the whole training.
    seed : int
    peak : float
        Learning rate.
    device : str
    """

    def __init__(
        self,
        directory: Path,
        stages: tuple[Stage, ...],
        minutes: float,
        seed: int = 0,
        peak: float = 2e-3,
        device: str = "cuda",
    ) -> None:
        self.directory, self.stages, self.seed, self.peak = directory, stages, seed, peak
        self.seconds = 60 * minutes
        self.device = torch.device(device)
        self.state = State(recall=[0.0] * len(stages))
        torch.manual_seed(seed)
        self.model = SmallSdar(ModelShape(VOCABULARY_SIZE)).to(self.device)
        self.optimizer = torch.optim.AdamW(_groups(self.model, peak), betas=(0.9, 0.95))
        self._layouts: dict[int, Layout] = {}
        self._file = directory / "training.pt"
        directory.mkdir(parents=True, exist_ok=True)

    def resume(self) -> bool:
        """Take up what an earlier run left; whether there was something."""
        if not self._file.exists():
            return False
        saved = torch.load(self._file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = State(**saved["state"])
        return True

    def save(self) -> None:
        """Keep all that `resume` needs; a file that is being written never takes the place of a whole one."""
        state = {f.name: getattr(self.state, f.name) for f in fields(State)}
        partial = self._file.with_suffix(".part")
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "state": state},
            partial,
        )
        partial.replace(self._file)

    def run(self, limit: float) -> bool:
        """Train for `limit` seconds at most; whether training is over."""
        began, before = time.monotonic(), self.state.seconds
        logged = saved = began
        figures = None
        while self.state.seconds < self.seconds and time.monotonic() - began < limit:
            figures = self.learn()
            now = time.monotonic()
            self.state.seconds = before + now - began
            if now - logged > 5:
                self._log(figures)
                logged = now
            if now - saved > 60:
                self.save()
                saved = now
        if figures is not None:
            self._log(figures)
        self.save()
        return self.state.seconds >= self.seconds

    def _stage(self, rng: np.random.Generator) -> int:
        """The stage of this step: the one that is being learnt, at times an earlier one."""
        last = len(self.stages) - 1
        if self.state.stage == last and rng.random() < 0.5:
            return int(rng.integers(last + 1))
        return self.state.stage

    def learn(self) -> dict[str, float]:
        """One step; its figures."""
        state, share = self.state, self.state.seconds / self.seconds
        rng = np.random.default_rng((self.seed, state.step))
        torch.manual_seed(self.seed + state.step)
        number = self._stage(rng)
        stage = self.stages[number]
        rows = recall_rows.rows(rng, stage.rows, stage.tokens, stage.questions)
        ids, answers, tasks = (part.to(self.device) for part in rows)
        layout = self._layout(stage)
        masked = recall_rows.mask_some(answers)
        shown = torch.where(masked, recall_rows.SPECIAL["mask"], answers)
        ids[:, layout.answers.flatten()] = shown.flatten(1)

        rate, auxiliary = learning_rate(state.step, share, self.peak), auxiliary_weight(share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            hidden, kept = self.model(ids, layout, RETRIEVAL_LAYER)
            loss, right = masked_cross_entropy(self.model, hidden, answers, masked, layout)
            total = loss
            if auxiliary:
                look = look_back_loss(self.model, ids, layout, LOOK_BACK, 128)
                total = loss + auxiliary * (look + copy_loss(self.model, ids, kept, 256))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

        recall = recall_rows.recall(right, masked, answers, tasks)
        # The median: one task that does not form keeps none of the others from longer documents.
        middle = float(np.median(list(recall.values())))
        state.recall[number] += 0.1 * (middle - state.recall[number])
        if number == state.stage and state.recall[number] > stage.enough and number + 1 < len(self.stages):
            state.stage += 1
        state.step += 1
        return {"tokens": stage.tokens, "rate": rate, "loss": loss.item(), **recall}

    def _layout(self, stage: Stage) -> Layout:
        if stage.tokens not in self._layouts:
            self._layouts[stage.tokens] = recall_rows.layout(stage.tokens, stage.questions, self.device)
        return self._layouts[stage.tokens]

    def _log(self, figures: dict[str, float]) -> None:
        state = self.state
        row = {"step": state.step, "seconds": round(state.seconds, 1), "stage": state.stage, **figures}
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        recall = " ".join(f"{value:.2f}" for value in state.recall)
        print(
            f"step {state.step}, {state.seconds:.0f} of {self.seconds:.0f} s: loss {figures['loss']:.3f}, "
            f"recall of the stages {recall}",
            flush=True,
        )


def _groups(model: SmallSdar, peak: float) -> list[dict[str, Any]]:
    """Matrices decay; gains of q and k learn five times as fast."""

    def pick(wanted: Any) -> Iterator[Tensor]:
        return (value for name, value in model.named_parameters() if wanted(name, value))

    def head_norm(name: str) -> bool:
        return "q_norm" in name or "k_norm" in name

    matrices = list(pick(lambda name, value: value.ndim > 1))
    norms = list(pick(lambda name, value: value.ndim == 1 and not head_norm(name)))
    head_norms = list(pick(lambda name, value: head_norm(name)))
    return [
        {"params": matrices, "weight_decay": 0.1, "times": 1.0, "lr": peak},
        {"params": norms, "weight_decay": 0.0, "times": 1.0, "lr": peak},
        {"params": head_norms, "weight_decay": 0.0, "times": 5.0, "lr": peak},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the checkpoint that comes with losart.")
    parser.add_argument("directory", type=Path, help="gets training.pt, log.jsonl and the checkpoint")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole training (9)")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="MINUTES", help="stop this run after"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    trainer = Trainer(args.directory, STAGES, args.minutes, args.seed, device=args.device)
    if trainer.resume():
        print(f"going on from step {trainer.state.step}")
    over = trainer.run(60 * args.limit)
    write_checkpoint(trainer.model, args.directory / "checkpoint", recall_rows.SPECIAL, recall_rows.BLOCK)
    write_tokenizer(args.directory / "checkpoint")
    print("training is over" if over else "run again to go on", flush=True)


if __name__ == "__main__":
    main()
