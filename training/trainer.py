"""Training in steps: what each does, and how an interrupted run is resumed."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import recall_rows
import torch
from optimizer import make_optimizer
from recall_losses import (
    RETRIEVAL_LAYER,
    copy_loss,
    look_back_loss,
    masked_cross_entropy,
    page_bound_loss,
)
from row_layout import Layout
from schedule import TASK_WEIGHTS, Stage, auxiliary_weight, learning_rate
from sdar_directory import read_weights
from small_sdar import ModelShape, SmallSdar

from losart.eval.tasks import TASKS
from losart.eval.vocabulary import VOCABULARY_SIZE

SHAPE = ModelShape(VOCABULARY_SIZE)
LOOK_BACK = (1, 2, 3, 15, 16, 17)  # an answer's token stands 16 after its question's
RECALL_EVERY = 8  # steps: counting it waits for the GPU


@dataclass
class State:
    """How far training is.

    Attributes
    ----------
    began : list of int
        First step of each stage that has begun.
    recall : list of dict
        Of each stage, running mean of the recall of each task.
    start : str or None
        Checkpoint whose weights training began with; None for random ones.
    """

    step: int = 0
    seconds: float = 0.0
    began: list[int] = field(default_factory=lambda: [0])
    recall: list[dict[str, float]] = field(default_factory=list)
    start: str | None = None

    @property
    def stage(self) -> int:
        """Number of the stage that is being learnt."""
        return len(self.began) - 1

    @property
    def finds_facts(self) -> bool:
        """Whether heads look at facts already: after the first stage, or from a checkpoint's weights."""
        return self.stage > 0 or self.start is not None

    @property
    def middle(self) -> list[float]:
        """Of each stage, the median of the tasks' recall."""
        return [float(np.median(list(of_task.values()))) for of_task in self.recall]


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
    page_bound : float
        Weight of `page_bound_loss`, once there are heads that find facts.
    shape : ModelShape
    """

    def __init__(
        self,
        directory: Path,
        stages: tuple[Stage, ...],
        minutes: float,
        seed: int = 0,
        peak: float = 2e-3,
        device: str = "cuda",
        page_bound: float = 0.3,
        shape: ModelShape = SHAPE,
    ) -> None:
        self.directory, self.stages, self.seed, self.peak = directory, stages, seed, peak
        self.page_bound, self.seconds = page_bound, 60 * minutes
        self.device = torch.device(device)
        self.state = State(recall=[dict.fromkeys(TASKS, 0.0) for _ in stages])
        torch.manual_seed(seed)
        self.model = SmallSdar(shape).to(self.device)
        self.optimizer = make_optimizer(self.model, peak)
        self._drawer = ThreadPoolExecutor(max_workers=1)
        self._drawn: tuple[int, int, Future[tuple[int, recall_rows.Rows]]] | None = None
        self._layouts: dict[int, Layout] = {}
        self._file = directory / "training.pt"
        directory.mkdir(parents=True, exist_ok=True)

    def resume(self) -> bool:
        """Resume an earlier run; returns whether there was one."""
        if not self._file.exists():
            return False
        saved = torch.load(self._file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = State(**saved["state"])
        return True

    def start(self, checkpoint: Path) -> None:
        """Begin with the weights of a checkpoint (see `read_weights`) instead of random ones."""
        self.model.load_state_dict(read_weights(checkpoint, self.model.shape))
        self.state.start = str(checkpoint)

    def save(self) -> None:
        """Keep all that `resume` needs; a file that is being written never takes the place of a whole one."""
        partial = self._file.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": asdict(self.state),
            },
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

    def learn(self) -> dict[str, Any]:
        """One step; its figures. The GPU may still have to be waited for to read its losses."""
        state, share = self.state, self.state.seconds / self.seconds
        number, drawn = self._next_rows()
        rows = drawn.to(self.device)
        layout = self._layout(self.stages[number])
        torch.manual_seed(self.seed + state.step)
        rate, auxiliary = learning_rate(state.step, share, self.peak), auxiliary_weight(share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            hidden, before = self.model(rows.ids, layout)
            loss, right = masked_cross_entropy(self.model, hidden, rows)
            figures = {"tokens": self.stages[number].tokens, "rate": rate, "loss": loss.detach()}
            total = loss
            if auxiliary:
                look = look_back_loss(self.model, rows.ids, layout, LOOK_BACK, 128)
                copy = copy_loss(self.model, rows.ids, before[RETRIEVAL_LAYER], 256)
                figures |= {"look_back": look.detach(), "copy": copy.detach()}
                total = total + auxiliary * (look + copy)
            # Only once heads find facts: with it from the first step of random weights none did, and recall
            # of 256 tokens was 0 after 8244 steps (page_bound 0.12, loss 2.4); without, 0.9 after 500.
            if auxiliary and self.page_bound and state.finds_facts:
                bound = page_bound_loss(self.model, before, layout, rows)
                figures["page_bound"] = bound.detach()
                total = total + auxiliary * self.page_bound * bound
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

        if state.step % RECALL_EVERY == 0:
            self._count(number, recall_rows.recall(right, rows.tasks))
        state.step += 1
        return figures

    def _count(self, number: int, found: dict[str, float]) -> None:
        """Take a step's recall into its stage's; the next stage begins when enough is learnt."""
        state, stage = self.state, self.stages[number]
        running = state.recall[number]
        for task, value in found.items():
            running[task] += 0.5 * (value - running[task])
        # The median: one task that does not form keeps none of the others from longer documents.
        learnt = number == state.stage and state.middle[number] > stage.enough
        if learnt and number + 1 < len(self.stages):
            state.began.append(state.step + 1)

    def _next_rows(self) -> tuple[int, recall_rows.Rows]:
        """This step's stage and rows; the next step's are drawn while the device works on these."""
        step, stage = self.state.step, self.state.stage
        if self._drawn is None or self._drawn[:2] != (step, stage):
            self._drawn = step, stage, self._drawer.submit(self._draw, step, stage)
        found = self._drawn[2].result()
        self._drawn = step + 1, stage, self._drawer.submit(self._draw, step + 1, stage)
        return found

    def _draw(self, step: int, stage: int) -> tuple[int, recall_rows.Rows]:
        """The stage that a step of some stage is of, in the last one any of them, and its rows."""
        rng = np.random.default_rng((self.seed, step))
        if stage == len(self.stages) - 1:
            shares = np.array([one.share for one in self.stages])
            stage = int(rng.choice(len(shares), p=shares / shares.sum()))
        of = self.stages[stage]
        rows = recall_rows.make_rows(rng, of.rows, of.tokens, of.questions, TASK_WEIGHTS)
        return stage, rows.pinned() if self.device.type == "cuda" else rows

    def _layout(self, stage: Stage) -> Layout:
        if stage.tokens not in self._layouts:
            self._layouts[stage.tokens] = recall_rows.layout(stage.tokens, stage.questions, self.device)
        return self._layouts[stage.tokens]

    def _log(self, figures: dict[str, Any]) -> None:
        state = self.state
        row = {
            "step": state.step,
            "seconds": round(state.seconds, 1),
            "stage": state.stage,
            "tokens": figures["tokens"],
            **{name: round(float(figures[name]), 6) for name in figures if name != "tokens"},
            "recall": self.recall(),
        }
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        middle = " ".join(f"{value:.2f}" for value in state.middle)
        print(
            f"step {state.step}, {state.seconds:.0f} of {self.seconds:.0f} s: loss {row['loss']:.3f}, "
            f"recall of the stages {middle}",
            flush=True,
        )

    def recall(self) -> dict[str, dict[str, float]]:
        """Running mean of each task's recall, by the tokens of the stages that have begun."""
        return {
            str(stage.tokens): {task: round(value, 4) for task, value in of_task.items()}
            for stage, of_task in zip(self.stages[: self.state.stage + 1], self.state.recall, strict=False)
        }
