"""The cells of the accuracy study: groups of settings, each of which varies one thing around a base point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from losart.eval import TASKS

Setting = dict[str, Any]  # options of `Model.generate`; one that has its default is left out

LENGTHS = (4096, 8192, 16384)
CORE = ("keys-4", "chain-2", "values", "chains-2")  # those on which methods differ
BLOCK = 16

BUDGETS = (16, 32, 64, 128, 256, 512, 1024)
DENSE: Setting = {"attention": "dense"}
LOSA: Setting = {"attention": "losa"}
PAPER = LOSA | {"active": 5}
QUEST: Setting = {"attention": "quest"}
SPARSED: Setting = {"attention": "sparsed"}
STATIC: Setting = {"remasking": "low_confidence_static"}
TWO = STATIC | {"denoising_steps": BLOCK // 2}  # tokens fixed per pass
REMASKING: dict[str, tuple[str, Setting]] = {
    "dynamic": ("Dynamic remasking, confidence above 0.85 (the default)", {}),
    "dynamic-0.6": ("Dynamic remasking, confidence above 0.6", {"confidence_threshold": 0.6}),
    "static-1": ("Static remasking, one token per pass", STATIC | {"denoising_steps": BLOCK}),
    "static-2": ("Static remasking, two tokens per pass", TWO),
    "static-4": ("Static remasking, four tokens per pass", STATIC | {"denoising_steps": BLOCK // 4}),
}
FEW: Setting = {"block_length": 4}


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
    **{
        name: Group(
            title,
            "LoSA by its defaults and with the paper's five active tokens.",
            [
                DENSE | remasking,
                *vary(
                    [LOSA, PAPER, QUEST, SPARSED], *(remasking | {"budget": budget} for budget in (64, 128))
                ),
            ],
            tuple(TASKS),
        )
        for name, (title, remasking) in REMASKING.items()
    },
    "budgets": Group(
        "Budgets",
        "Dynamic remasking.",
        [DENSE, *vary([LOSA, PAPER, QUEST, SPARSED], *({"budget": budget} for budget in BUDGETS))],
    ),
    "budgets-static": Group(
        "Budgets, static remasking",
        "Two tokens per pass.",
        [DENSE | TWO, *vary([LOSA, PAPER, QUEST], *(TWO | {"budget": budget} for budget in BUDGETS))],
    ),
    "active": Group(
        "Active tokens",
        "Budget 64: thresholds of the relative change, and counts.",
        vary(
            [
                *vary([LOSA], *({"change_threshold": threshold} for threshold in (0.05, 0.1, 0.2, 0.3))),
                *vary([LOSA], *({"active": count} for count in (3, 5, 8, 12))),
                LOSA,
            ],
            *({"budget": 64} | remasking for _, remasking in REMASKING.values()),
        ),
    ),
    "options": Group(
        "Options",
        "Budget 64: what change is measured against, which tokens can be active, and what ranks pages.",
        vary(
            [
                *vary([LOSA], {}, {"drift": "previous"}, {"candidates": "masked"}, {"selector": "anchor"}),
                *vary([PAPER], {}, {"drift": "refresh"}, {"candidates": "masked"}, {"selector": "anchor"}),
            ],
            *({"budget": 64} | REMASKING[name][1] for name in ("dynamic", "static-1", "static-2")),
        ),
    ),
    "masked": Group(
        "Only masked tokens active",
        "A token that was just fixed changed most, and may not have to look again.",
        vary(
            [
                LOSA,
                LOSA | {"candidates": "masked"},
                LOSA | {"candidates": "masked", "change_threshold": 0.05},
            ],
            *(
                {"budget": budget} | remasking
                for _, remasking in REMASKING.values()
                for budget in (64, 128, 256)
            ),
        ),
        (*CORE, "chain-3"),
    ),
    "commit": Group(
        "Commit",
        "The pass that writes a block's keys and values, dense and sparse. Blocks of 4 tokens, so that an "
        "answer takes several and later hops begin from what was committed.",
        [
            DENSE | FEW,
            *vary(
                [LOSA, QUEST],
                *(
                    FEW | {"budget": budget} | commit
                    for budget in (32, 256)
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
            {"budget": 64} | TWO,
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
    """A setting in words."""
    words = [str(setting["attention"])]
    if setting.get("remasking") == STATIC["remasking"]:
        words.append(f"static, {setting.get('block_length', BLOCK) // setting['denoising_steps']} a pass")
    words += [f"{name} {value}" for name, value in setting.items() if name not in {"attention", *TWO}]
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
