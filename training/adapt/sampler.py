"""Dialogues that the base model makes up itself, question and answer (Magpie, arXiv 2406.08464).

The chat template up to the user's turn is all that it is given, and half of the time how the question
begins. A row that has finished a dialogue begins its next one at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losart.eval.repetition import repeated

from .base_model import Base
from .chat_format import ChatFormat
from .decoder import Weights
from .sampler_step import TorchStep, TritonStep
from .texts import Texts, collect

OPENERS = """
What is|What are|What|Who|Where|When|Why|How do|How does|How can I|How|Explain|Write a short|
Write two sentences about|Write a poem about|Write|Describe|Tell me about|Give me|List three|List|Summarize|
Can you|Is it|Which|Name|Translate|Create|I want to|My|Compare|Define|Tell me a story about|In one sentence,|
Briefly explain|What is the capital of|Suggest|Should I|Do|Help me
""".replace("\n", "").split("|")
STEPS_AT_ONCE = 100
_TOKEN, _ANSWER, _GIVEN, _FLAG = (1 << 20) - 1, 1 << 20, 1 << 21, 22
WHOLE, TOO_LONG, CUT = 1, 2, 4  # flags of a dialogue's last token


@dataclass(frozen=True)
class Sampling:
    """How dialogues are drawn.

    Attributes
    ----------
    question_temperature, answer_temperature, min_p : float
    another_turn : float
        Chance that a dialogue that has room goes on.
    opened : float
        Share of first questions whose beginning is given.
    longest_question : int
        Tokens; dialogues with longer ones are dropped.
    most_repeated : float
        Dialogues are dropped whose answers repeat more than this share of their 4-grams.
    rows, length : int
        Dialogues at a time, and tokens of each at most.
    """

    question_temperature: float = 1.0
    answer_temperature: float = 0.3
    min_p: float = 0.05
    another_turn: float = 0.25
    opened: float = 0.55
    longest_question: int = 160
    most_repeated: float = 0.25
    rows: int = 2048
    length: int = 768


class Sampler:
    """Draws dialogues until it is told to stop.

    Parameters
    ----------
    base : Base
    weights : dict
        On the device to use.
    chat : ChatFormat
    options : Sampling
    seed : int
    steps : int
        At most.
    triton : bool, optional
        By default on a GPU.
    """

    def __init__(
        self,
        base: Base,
        weights: Weights,
        chat: ChatFormat,
        options: Sampling,
        seed: int,
        steps: int,
        triton: bool | None = None,
    ) -> None:
        self.chat, self.options = chat, options
        self.device = device = weights["embed"].device
        rows = options.rows
        torch.manual_seed(seed)
        kind = TritonStep if (device.type == "cuda" if triton is None else triton) else TorchStep
        banned = torch.ones(base.shape.vocab, dtype=torch.bool, device=device)
        banned[[token for token in base.text_tokens if token < base.shape.vocab]] = False
        banned[chat.end_id] = False
        self.model = kind(base.shape, weights, rows, options.length, banned, options.min_p, seed)
        self.model.begin(chat.before)
        openers = [base.tokenizer.encode(text, special=False) for text in OPENERS]
        unopened = round(len(openers) * (1 - options.opened) / max(options.opened, 1e-3))
        given = [chat.to_answer[1:], chat.to_question[1:], *openers, *[[]] * unopened]
        self._given = torch.zeros(len(given), max(map(len, given)), dtype=torch.int64, device=device)
        self._lengths = torch.tensor([len(ids) for ids in given], device=device)
        for number, ids in enumerate(given):
            self._given[number, : len(ids)] = torch.tensor(ids, dtype=torch.int64)

        def row(value: int) -> Tensor:
            return torch.full((rows,), value, dtype=torch.int64, device=device)

        self.tokens, self.positions = row(chat.before[-1]), row(len(chat.before) - 1)
        self.answers, self.at = row(0), row(0)  # whether the assistant writes; tokens of what is given, taken
        self.which, self.turn = self._opener(), row(len(chat.before) - 1)
        self.temperatures = torch.full((rows,), options.question_temperature, device=device)
        self.out = torch.zeros(steps, rows, dtype=torch.int32, device=device)
        self.step_number = torch.zeros(1, dtype=torch.int64, device=device)

    def _opener(self) -> Tensor:
        """What the next questions begin with."""
        share = torch.rand(self.options.rows, device=self.device)
        return 2 + (share * (len(self._given) - 2)).long().clamp(max=len(self._given) - 3)

    @torch.no_grad()
    def step(self) -> None:
        """One token of every row; all in place, so that a CUDA graph can repeat it."""
        options, chat = self.options, self.chat
        drawn = self.model(self.tokens, self.positions, self.temperatures)
        given = self.at < self._lengths[self.which]
        next_given = self._given[self.which, self.at.clamp(max=self._given.shape[1] - 1)]
        token = torch.where(given, next_given, drawn)
        position, asks = self.positions + 1, self.answers == 0
        ends = ~given & (token == chat.end_id)
        going_on = torch.rand_like(self.temperatures) < options.another_turn
        again = ends & ~asks & going_on & (position < 0.55 * options.length)
        whole = ends & ~asks & ~again
        full = (position + 1 >= options.length) & ~whole
        long = asks & (position - self.turn > options.longest_question) & ~ends | (full & asks)
        flag = whole * WHOLE + (long * TOO_LONG + (full & ~asks) * CUT) * ~whole
        kept = token + self.answers * _ANSWER + given * _GIVEN + (flag << _FLAG)
        self.out.index_copy_(0, self.step_number, kept.int()[None])
        self.step_number += 1

        over, answers_now = flag > 0, ends & asks
        self.tokens.copy_(torch.where(over, chat.before[-1], token))
        self.turn.copy_(torch.where(over, len(chat.before) - 1, torch.where(again, position, self.turn)))
        self.positions.copy_(torch.where(over, len(chat.before) - 1, position))
        which = torch.where(answers_now, 0, torch.where(again, 1, self.which))
        self.which.copy_(torch.where(over, self._opener(), which))
        taken = torch.where(given, self.at + 1, self.at)
        self.at.copy_(torch.where(over | answers_now | again, 0, taken))
        answering = torch.where(answers_now, 1, torch.where(again, 0, self.answers))
        self.answers.copy_(torch.where(over, 0, answering))
        warm = torch.where(self.answers > 0, options.answer_temperature, options.question_temperature)
        self.temperatures.copy_(warm)

    def run(self, seconds: float, say: Callable[[str], None] = lambda text: None) -> NDArray[np.int32]:
        """Draw until the time is over or there is no room; what was drawn, [steps, rows]."""
        began, step = time.monotonic(), self.step
        if self.device.type == "cuda":
            step = self._graph()
        ready = time.monotonic()
        say(f"first steps after {ready - began:.1f} s")
        done = int(self.step_number)
        first = done
        while done < len(self.out) and time.monotonic() - began < seconds:
            count = min(STEPS_AT_ONCE if self.device.type == "cuda" else 1, len(self.out) - done)
            for _ in range(count):
                step()
            done += count
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        rate = (done - first) * self.options.rows / max(time.monotonic() - ready, 1e-9)
        say(f"{done} steps of {self.options.rows} rows, {rate:.0f} tokens/s")
        return self.out[:done].cpu().numpy()

    def _graph(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def dialogues(
    drawn: NDArray[np.int32], chat: ChatFormat, most_repeated: float
) -> tuple[Texts, dict[str, int]]:
    """The dialogues of what `Sampler.run` returned, and how many were kept and dropped, and why."""
    before = np.array(chat.before, np.int32)
    counts = dict.fromkeys(("whole", "cut", "question too long", "repeats itself", "empty"), 0)
    kept: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    for column in np.ascontiguousarray(drawn.T):
        flags, tokens = column >> _FLAG, column & _TOKEN
        answers = (column & _ANSWER > 0) & (column & _GIVEN == 0)
        start = 0
        for last in np.flatnonzero(flags).tolist():
            part = slice(start, last + 1)
            start = last + 1
            if flags[last] == TOO_LONG:
                counts["question too long"] += 1
                continue
            said = tokens[part][answers[part]]
            if len(said) < 2 or said[0] == chat.end_id:
                counts["empty"] += 1
            elif repeated(said.tolist()) > most_repeated:
                counts["repeats itself"] += 1
            else:
                counts["whole" if flags[last] == WHOLE else "cut"] += 1
                ids = np.concatenate([before, tokens[part]])
                kept.append((ids, np.concatenate([np.zeros(len(before), bool), answers[part]])))
    return collect(kept), counts
