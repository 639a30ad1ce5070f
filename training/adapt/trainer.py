"""Training in steps: what each does, and how an interrupted run is resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losart.errors import CheckpointError

from .decoder import Shape, Weights, embed, fused, layer, rotation
from .objective import losses, weighted_mean
from .step_texts import Stage, draw_stream
from .stream import Noise, Sizes, Stream
from .stream_attention import StreamAttention, attend
from .texts import Texts
from .trainable import Lora, Trainable

WARM_UP = 40  # steps
LOWEST = 0.05  # of the learning rate, at the end
UNTIMED = 3  # steps of each run, in which code is compiled
SAVE_EVERY, LOG_EVERY = 150.0, 5.0  # seconds


@dataclass(frozen=True)
class Plan:
    """What a training is to do.

    Attributes
    ----------
    seconds : float
        Of the training, compilation not counted.
    steps : int, optional
        How many instead.
    rate : float
        Peak learning rate.
    sizes : Sizes
    noise : Noise
    blocks : tuple of int
        Block lengths, divisors of 16.
    certain : float
        Weight of the doubt where the guess is right; see `losses`.
    lora : Lora or None
    seed : int
    """

    seconds: float
    rate: float
    sizes: Sizes
    noise: Noise
    blocks: tuple[int, ...] = (4, 8, 16)
    certain: float = 0.0
    lora: Lora | None = None
    steps: int | None = None
    seed: int = 0


@dataclass
class State:
    """How far training is."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Trainer:
    """Weights, optimizer, state, and the files that they are kept in.

    Parameters
    ----------
    directory : Path
        Gets training.pt and log.jsonl.
    shape : Shape
    base : dict
        Weights in float32, on the device.
    texts : mapping of str to Texts
    stages : tuple of Stage
    plan : Plan
    flex : bool, optional
        Whether to compile, with FlexAttention; by default on a GPU.
    """

    def __init__(
        self,
        directory: Path,
        shape: Shape,
        base: Weights,
        texts: Mapping[str, Texts],
        stages: tuple[Stage, ...],
        plan: Plan,
        flex: bool | None = None,
    ) -> None:
        self.directory, self.shape, self.texts, self.stages, self.plan = directory, shape, texts, stages, plan
        self.device = base["embed"].device
        cuda = self.device.type == "cuda"
        self.flex = cuda if flex is None else flex
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.trainable = Trainable(shape, base, plan.lora, plan.seed)
        self.optimizer = torch.optim.AdamW(
            self.trainable.parameters.values(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.attention = StreamAttention(plan.sizes, self.device, self.flex)
        self.state = State()
        self._layer, self._losses = _compiled() if self.flex else (_stream_layer, losses)
        self._drawer = ThreadPoolExecutor(max_workers=1)
        self._drawn: tuple[int, int, Future[Stream]] | None = None
        self._file = directory / "training.pt"
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def share(self) -> float:
        """How much of the training is over."""
        plan, state = self.plan, self.state
        return state.step / plan.steps if plan.steps else state.seconds / plan.seconds

    def save(self) -> None:
        """Keep all that `resume` needs; a file that is being written never takes the place of a whole one."""
        partial_file = self._file.with_suffix(".part")
        torch.save(
            {
                "parameters": self.trainable.parameters,
                "optimizer": self.optimizer.state_dict(),
                "state": asdict(self.state),
                "plan": json.dumps(asdict(self.plan)),
            },
            partial_file,
        )
        partial_file.replace(self._file)

    def resume(self) -> bool:
        """Resume an earlier run; returns whether there was one.

        Raises
        ------
        CheckpointError
            It trains something else: all weights, or products of another rank.
        """
        if not self._file.exists():
            return False
        saved = torch.load(self._file, map_location=self.device, weights_only=True)
        mine = self.trainable.parameters
        if {name: value.shape for name, value in saved["parameters"].items()} != {
            name: value.shape for name, value in mine.items()
        }:
            raise CheckpointError(f"{self._file}: has other parameters than these options ask for")
        with torch.no_grad():
            for name, value in saved["parameters"].items():
                mine[name].copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = State(**saved["state"])
        return True

    def run(self, limit: float, say: Callable[[str], None] = print) -> bool:
        """Train for `limit` seconds at most, compilation counted; whether training is over."""
        began = timed = time.monotonic()
        logged = saved = began
        before, tokens_before, done = self.state.seconds, self.state.tokens, 0
        loss = None
        while self.share < 1 and time.monotonic() - began < limit:
            loss = self.learn()
            done += 1
            if done == UNTIMED:
                self._wait()
                timed, tokens_before = time.monotonic(), self.state.tokens
                say(f"compiled and warm after {timed - began:.1f} s")
            now = time.monotonic()
            if done > UNTIMED:
                self.state.seconds = before + now - timed
            if now - logged > LOG_EVERY and done > UNTIMED:
                self._log(loss, (self.state.tokens - tokens_before) / (now - timed), say)
                logged = time.monotonic()
            if now - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        if loss is not None and done > UNTIMED:
            self._log(loss, (self.state.tokens - tokens_before) / (time.monotonic() - timed), say)
        self.save()
        return self.share >= 1

    def learn(self) -> dict[str, Tensor]:
        """One step; its losses. The GPU may still have to be waited for to read them."""
        plan, state = self.plan, self.state
        stream = self._next_stream().to(self.device)
        rate = plan.rate * min(1.0, (state.step + 1) / WARM_UP)
        rate *= LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.share)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        cross_entropy, doubt = self.losses_of(stream, self.trainable.weights(self.dtype))
        loss = weighted_mean(cross_entropy, stream.weights)
        doubt = weighted_mean(doubt, stream.weights)
        (loss + plan.certain * doubt).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += plan.sizes.clean
        return {"loss": loss.detach(), "doubt": doubt.detach(), "gradient": norm}

    def losses_of(self, stream: Stream, weights: Weights) -> tuple[Tensor, Tensor]:
        """Cross-entropy and doubt of each of a stream's targets; the latter only if the plan weighs it."""
        x = self.rows_of(stream, weights)
        head = weights["embed"] if self.shape.tied else weights["head"]
        return self._losses(
            *(self.shape, x[0, stream.rows], weights["final_norm"], head, stream.targets),
            self.plan.certain > 0,
        )

    def rows_of(self, stream: Stream, weights: Weights) -> Tensor:
        """The last layer's rows of a stream, [1, tokens, hidden]."""
        self.attention.set(stream)
        x = embed(weights, stream.ids[None], self.plan.noise.mask_id)
        cos, sin = (part[None, :, None] for part in rotation(self.shape, stream.positions))
        for tensors in fused(self.shape, weights):
            x = self._layer(self.shape, x, tensors, cos, sin, self.attention.mask)
        return x

    def draw(self, step: int, stage: int) -> Stream:
        """What a step of a stage trains on."""
        rng = np.random.default_rng((self.plan.seed, step))
        plan = self.plan
        return draw_stream(rng, self.texts, self.stages[stage], plan.sizes, plan.noise, plan.blocks)

    def _next_stream(self) -> Stream:
        """This step's; the next step's is drawn while the device works on this one's."""
        step, share = self.state.step, self.share
        stage = next((i for i, one in enumerate(self.stages) if share < one.until), len(self.stages) - 1)
        if self._drawn is None or self._drawn[:2] != (step, stage):
            self._drawn = step, stage, self._drawer.submit(self.draw, step, stage)
        found = self._drawn[2].result()
        self._drawn = step + 1, stage, self._drawer.submit(self.draw, step + 1, stage)
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _log(self, figures: dict[str, Any], rate: float, say: Callable[[str], None]) -> None:
        state, plan = self.state, self.plan
        row = {"step": state.step, "seconds": round(state.seconds, 1), "tokens": state.tokens}
        row |= {name: round(float(value), 5) for name, value in figures.items()}
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        left = state.seconds * (1 / max(self.share, 1e-6) - 1) if plan.steps else plan.seconds - state.seconds
        say(
            f"step {state.step}: loss {row['loss']:.3f}, doubt {row['doubt']:.3f}, {rate / 1e3:.0f}K clean "
            f"tokens/s, {state.seconds:.0f} s, {max(left, 0):.0f} s left"
        )


def _stream_layer(
    shape: Shape, x: Tensor, tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, mask: Any
) -> Tensor:
    return layer(shape, x, tensors, cos, sin, partial(attend, mask))


@lru_cache(maxsize=1)
def _compiled() -> tuple[Any, Any]:
    return torch.compile(_stream_layer, dynamic=False), torch.compile(losses, dynamic=False)
