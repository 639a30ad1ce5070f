"""Asks a model the questions of every cell of a grid: task, length, attention setting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from losart.api.session import OF_THE_CACHE
from losart.config.checks import is_int
from losart.errors import OptionError
from losart.eval.figures import Figures, figures
from losart.eval.questions import STYLES, find_style, make_questions
from losart.eval.tasks import TASKS, find_task
from losart.observe.step import Progress, Stats

ANSWER_TOKENS = {"symbols": 16, "english": 64}


@dataclass(frozen=True)
class EvalConfig:
    """What is measured.

    Attributes
    ----------
    tasks : tuple of str
    lengths : tuple of int
        Tokens of a prompt.
    attention : tuple of str
    budgets : tuple of int
        For all methods but dense.
    active : tuple of "auto", int or float
        For losa.
    samples : int
        Questions in each cell.
    seed : int
        Same seed, same questions; also that of sampling with a temperature.
    style : {"auto", "symbols", "english"}
        "auto" is English for a checkpoint that chats.
    options : mapping
        Further options of `Model.generate`, for all cells. `max_new_tokens` is by default 16 for
        symbols and 64 for English.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (1024, 4096)
    attention: tuple[str, ...] = ("dense", "losa", "quest", "sparsed")
    budgets: tuple[int, ...] = (128,)
    active: tuple[int | float | str, ...] = ("auto",)
    samples: int = 50
    seed: int = 0
    style: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths", "attention", "budgets", "active"):
            if not len(getattr(self, name)):
                raise OptionError(f"{name} must not be empty")
        for name in self.tasks:
            find_task(name)
        if self.style not in STYLES:
            raise OptionError(f"style must be {', '.join(STYLES)}, not {self.style!r}")
        for name, lowest in (("samples", 1), ("seed", 0)):
            value = getattr(self, name)
            if not (is_int(value) and value >= lowest):
                raise OptionError(f"{name} must be an integer, {lowest} or more, not {value!r}")
        for length in self.lengths:
            if not (is_int(length) and length > 0):
                raise OptionError(f"lengths must be positive numbers of tokens, not {length!r}")

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Options of `Model.generate` for each setting: dense has no budget, only losa has `active`."""
        settings: list[dict[str, Any]] = []
        for method in self.attention:
            budgets = [{}] if method == "dense" else [{"budget": count} for count in self.budgets]
            active = [{"active": count} for count in self.active] if method == "losa" else [{}]
            settings += [
                {"attention": method} | budget | counts
                for budget, counts in itertools.product(budgets, active)
            ]
        return settings

    def shared_options(self, max_new_tokens: int) -> dict[str, Any]:
        """Options of `Model.generate` for all settings; `options` may have another `max_new_tokens`."""
        return {"max_new_tokens": max_new_tokens, "seed": self.seed, **self.options}


@dataclass(frozen=True)
class Cell(Figures):
    """Figures of one task at one length with one attention setting.

    Attributes
    ----------
    task : str
    length : int
        Tokens of a prompt.
    right : int
        Questions answered right.
    accuracy, low, high : float
        Share of right answers and its 95% interval (Wilson).
    prefilled_tokens : int
        Prompt tokens that went through the model for this setting: the first one's, since the others find
        the prompt in the KV cache, and of prompts that share a document only what they do not share.
    """

    task: str
    length: int
    right: int
    accuracy: float
    low: float
    high: float
    prefilled_tokens: int


def evaluate(
    model: Any,
    config: EvalConfig | None = None,
    *,
    on_cell: Callable[[Cell], None] | None = None,
    progress: Progress | None = None,
) -> list[Cell]:
    """Measure a model.

    Parameters
    ----------
    model : losart.Model
    config : EvalConfig, optional
    on_cell : callable, optional
        Called with each cell's figures, once all settings have been asked its questions.
    progress : callable, optional
        Called after each question with questions done and in all.

    Raises
    ------
    OptionError
        An option is unknown, out of range, or does not suit the checkpoint; before any question.
    PromptError
        A question cannot be tokenized.
    """
    config = EvalConfig() if config is None else config
    style = check_config(model, config)
    grid = list(itertools.product(config.lengths, config.tasks))
    total = len(grid) * len(config.settings) * config.samples
    done = itertools.count(1)

    def answered() -> None:
        if progress is not None:
            progress(next(done), total)

    cells: list[Cell] = []
    for length, task in grid:
        for cell in measure(model, task, length, config.settings, config, style, answered):
            cells.append(cell)
            if on_cell is not None:
                on_cell(cell)
    return cells


def measure(
    model: Any,
    task: str,
    length: int,
    settings: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    style: str,
    answered: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """Ask the questions of one task and length with several settings, which share the KV cache.

    Parameters
    ----------
    model : losart.Model
    task : str
    length : int
    settings : sequence of mapping
        Options of `Model.generate` beside the configuration's own; they agree in what a session's
        generations must agree in.
    config : EvalConfig
        Its number of questions, seed and options.
    style : {"symbols", "english"}
    answered : callable
        Called after each question.
    """
    shared = config.shared_options(ANSWER_TOKENS[style])
    # Without the first setting's other options, which would be the defaults of all other settings.
    session = model.session(
        **shared | {name: settings[0][name] for name in OF_THE_CACHE if name in settings[0]}
    )
    answers: list[list[tuple[bool, Stats]]] = [[] for _ in settings]
    for question in make_questions(model, TASKS[task], length, config.samples, config.seed, style):
        for setting, given in zip(settings, answers, strict=True):
            result = session.generate(question.prompt, **setting)
            given.append((question.is_right(result.text), result.stats))
            answered()
    parts = zip(settings, answers, strict=True)
    return [_cell(task, length, setting, given) for setting, given in parts]


def check_config(model: Any, config: EvalConfig, questions: bool = True) -> str:
    """Check that a model can be measured with a configuration; returns the style of its questions.

    Without `questions` none of the tasks' are asked.

    Raises
    ------
    OptionError
        As `evaluate`.
    """
    style = find_style(model, config.style)
    for setting in config.settings:
        model.session(**config.shared_options(ANSWER_TOKENS[style]), **setting)  # rejects wrong options
    for length in config.lengths:
        if not (length < model.config.max_positions):
            raise OptionError(
                f"lengths: {length} tokens and an answer do not fit the model's {model.config.max_positions} "
                f"positions"
            )
        for name in config.tasks if questions else ():  # rejects lengths that have no room for the facts
            next(make_questions(model, TASKS[name], length, 1, config.seed, style))
    return style


def _cell(task: str, length: int, setting: Mapping[str, Any], answers: Sequence[tuple[bool, Stats]]) -> Cell:
    right, stats = sum(one for one, _ in answers), [one for _, one in answers]
    low, high = wilson_interval(right, len(stats))
    return Cell(
        **figures(setting, stats),
        task=task,
        length=length,
        right=right,
        accuracy=right / len(stats),
        low=low,
        high=high,
        prefilled_tokens=sum(one.prefilled_tokens for one in stats),
    )


def wilson_interval(right: int, samples: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927); 95% by default.

    Returns
    -------
    low, high : float
        Between 0 and 1.
    """
    share, square = right / samples, z * z / samples
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt((share * (1 - share) + square / 4) / samples)
    return max(0.0, middle - half), min(1.0, middle + half)
