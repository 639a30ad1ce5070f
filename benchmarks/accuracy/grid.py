"""The cells of the accuracy study: groups of settings, each of which varies one thing around a base point."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from losart.eval import TASKS

Setting = dict[str, Any]  # options of `Model.generate`; one that has its default is left out

LENGTHS = (8192, 4096)
CORE = ("keys-4", "chain-2", "values", "chains-2")  # those on which methods differ
BLOCK = 16

BUDGETS = (64, 256, 1024, 128, 512, 32, 16)  # the most informative first
BUDGET = 256
SHARED: Setting = {"remasking": "low_confidence_static", "denoising_steps": 8}  # two tokens per pass
DENSE = SHARED | {"attention": "dense"}
QUEST = SHARED | {"attention": "quest", "budget": BUDGET}
SPARSED = SHARED | {"attention": "sparsed", "budget": BUDGET}
LOSA = SHARED | {"attention": "losa", "budget": BUDGET, "active": 5}
ANCHOR = LOSA | {"selector": "anchor"}
SPARSE_METHODS = (LOSA, QUEST, SPARSED, ANCHOR)
FEW: Setting = {"block_length": 4, "denoising_steps": 2}  # two tokens per pass, as in blocks of 16

BEYOND_THE_PAPER: tuple[Setting, ...] = (
    {"selector": "anchor"},
    {"drift": "refresh"},
    {"candidates": "masked"},
)


def together(options: Sequence[Setting]) -> list[Setting]:
    """Each of the options alone, any two of them, ..., and all."""
    chosen = (some for count in range(len(options)) for some in itertools.combinations(options, count + 1))
    return [dict(item for option in some for item in option.items()) for some in chosen]


def vary(methods: Sequence[Setting], *changes: Setting) -> list[Setting]:
    """All methods with each change."""
    return [method | change for change in changes for method in methods]


@dataclass(frozen=True)
class Group:
    """Settings that are compared with each other, on the same questions.

    Attributes
    ----------
    title, note : str
        For the report.
    settings : list of Setting
    tasks : tuple of str
    """

    title: str
    note: str
    settings: list[Setting]
    tasks: tuple[str, ...] = CORE


GROUPS = {
    "budgets": Group(
        "Budgets",
        "LoSA with 5 active tokens; beside it LoSA with `selector=anchor`.",
        [DENSE, *vary(SPARSE_METHODS, *({"budget": budget} for budget in BUDGETS))],
    ),
    "tasks": Group(
        "All tasks",
        "Budget 64.",
        [
            DENSE,
            *vary([LOSA, QUEST, SPARSED, ANCHOR, ANCHOR | {"candidates": "masked"}], {"budget": 64}),
        ],
        tuple(TASKS),
    ),
    "options": Group(
        "Options beyond the paper",
        "LoSA with 5 active tokens: `selector`, `drift` and `candidates`, alone and together.",
        [
            setting
            for budget in (64, BUDGET)
            for setting in vary([LOSA | {"budget": budget}], {}, *together(BEYOND_THE_PAPER))
        ],
    ),
    "active": Group(
        "Active tokens",
        f"Budget {BUDGET}.",
        vary([LOSA, ANCHOR], *({"active": count} for count in (1, 3, 5, 8))),
    ),
    "tokens": Group(
        "Tokens fixed in a pass",
        f"Budget {BUDGET}; 16, 8 and 4 passes over a block.",
        vary([DENSE, *SPARSE_METHODS], *({"denoising_steps": BLOCK // tokens} for tokens in (1, 2, 4))),
    ),
    "commit": Group(
        "Commit",
        "The pass that writes a block's keys and values, dense and sparse. Blocks of 4 tokens, so that an "
        "answer takes several and later hops begin from what was committed; LoSA with 2 active tokens.",
        [
            DENSE | FEW,
            *vary(
                [LOSA | {"active": 2}, QUEST, SPARSED, ANCHOR | {"active": 2}],
                *(
                    FEW | {"budget": budget} | commit
                    for budget in (32, BUDGET)
                    for commit in ({}, {"commit": "sparse"})
                ),
            ),
        ],
        ("chain-3", "chains-2"),
    ),
    "first": Group(
        "First pass",
        "The first pass over a block, dense and sparse: LoSA's is dense by itself, QUEST's sparse.",
        vary(
            [LOSA, LOSA | {"first_pass": "sparse"}, QUEST, QUEST | {"first_pass": "dense"}],
            {"budget": 64},
            {"budget": BUDGET},
        ),
    ),
}


@dataclass(frozen=True)
class Asked:
    """A cell to be measured: a task at a length with a setting."""

    task: str
    length: int
    setting: Setting

    @property
    def key(self) -> str:
        """Equal for equal cells."""
        return cell_key(self.task, self.length, self.setting)


def cell_key(task: str, length: int, setting: Mapping[str, Any]) -> str:
    """What identifies a cell."""
    return json.dumps([task, length, sorted(setting.items())])


def label(setting: Setting) -> str:
    """A setting in words, without what all settings share."""
    tokens = setting.get("block_length", BLOCK) // setting["denoising_steps"]
    words = [str(setting["attention"])]
    words += [f"{name} {value}" for name, value in setting.items() if name not in {*SHARED, "attention"}]
    if tokens != BLOCK // SHARED["denoising_steps"]:
        words.append(f"tokens a pass {tokens}")
    return ", ".join(words)


def cells(
    groups: Sequence[str] = tuple(GROUPS), lengths: Sequence[int] = LENGTHS, tasks: Sequence[str] = ()
) -> list[Asked]:
    """The cells of some groups, the most informative first; one that several groups have occurs once.

    Parameters
    ----------
    groups : sequence of str
        Keys of `GROUPS`.
    lengths : sequence of int
    tasks : sequence of str
        Only these of a group's tasks; all of them if empty.
    """

    every = (
        Asked(task, length, setting)
        for length in lengths
        for name in groups
        for setting in GROUPS[name].settings
        for task in GROUPS[name].tasks
        if not tasks or task in tasks
    )
    return list({cell.key: cell for cell in every}.values())
