"""The cells of the accuracy study: groups of settings, each of which varies one thing around a base point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from losart.eval import TASKS

Tasks = tuple[str, ...]
Setting = dict[str, Any]  # options of `Model.generate`; one that has its default is left out

BUDGETS = (16, 32, 64, 128, 256, 512, 1024)
DENSE: Setting = {"attention": "dense"}
LOSA: Setting = {"attention": "losa"}
BY_BOUND: Setting = LOSA | {"change_threshold": 0.15, "selector": "quest"}
QUEST: Setting = {"attention": "quest"}
SPARSED: Setting = {"attention": "sparsed"}
STATIC: Setting = {"remasking": "low_confidence_static"}
FEW: Setting = {"block_length": 4}
PAPER_SHARE = 0.3  # of a block's tokens are active


def paper(block: int) -> Setting:
    """LoSA with as many active tokens as the paper has, of a block's."""
    return LOSA | {"active": round(PAPER_SHARE * block)}


def static(tokens: int, block: int) -> Setting:
    """So many tokens fixed by a pass."""
    return STATIC | {"denoising_steps": block // tokens}


def remaskings(block: int) -> dict[str, tuple[str, Setting]]:
    """What a group is called, its title, and how tokens are fixed."""
    return {
        "dynamic": ("Dynamic remasking (the default)", {}),
        "dynamic-0.6": ("Dynamic remasking, confidence above 0.6", {"confidence_threshold": 0.6}),
        "static-1": ("Static remasking, one token per pass", static(1, block)),
        "static-2": ("Static remasking, two tokens per pass", static(2, block)),
        "static-4": ("Static remasking, four tokens per pass", static(4, block)),
    }


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
    tasks: Tasks


def groups_of(block: int, core: Tasks, every: Tasks, masked: Tasks) -> dict[str, Group]:
    """All groups, for blocks of a length.

    Parameters
    ----------
    block : int
    core : tuple of str
        Tasks on which methods differ.
    every, masked : tuple of str
        Those of the groups by remasking, and of "masked".
    """
    remasking_of, counted, two = remaskings(block), paper(block), static(2, block)
    counts = dict.fromkeys(round(share * block) for share in (0.2, PAPER_SHARE, 0.5, 0.75))
    return {
        **{
            name: Group(
                title,
                "LoSA by its defaults, with a higher threshold and all pages by the bound, and with as many "
                "active tokens as in the paper, 0.3 of a block.",
                [
                    DENSE | remasking,
                    *vary(
                        [LOSA, BY_BOUND, counted, QUEST, SPARSED],
                        *(remasking | {"budget": budget} for budget in (64, 128)),
                    ),
                ],
                every,
            )
            for name, (title, remasking) in remasking_of.items()
        },
        "budgets": Group(
            "Budgets",
            "Dynamic remasking.",
            [
                DENSE,
                *vary([LOSA, BY_BOUND, counted, QUEST, SPARSED], *({"budget": budget} for budget in BUDGETS)),
            ],
            core,
        ),
        "budgets-static": Group(
            "Budgets, static remasking",
            "Two tokens per pass.",
            [
                DENSE | two,
                *vary([LOSA, BY_BOUND, counted, QUEST], *(two | {"budget": budget} for budget in BUDGETS)),
            ],
            core,
        ),
        "selectors": Group(
            "What ranks pages, and who is active",
            "Half of the pages by their mass in the first pass and half by QUEST's bound (LoSA by its "
            "defaults), all by the bound, or all by mass; tokens active whose relative change is above 0.05 "
            "(the default) or 0.15.",
            vary(
                [
                    *vary([LOSA], {}, {"selector": "quest"}, {"selector": "anchor"}),
                    *vary(
                        [LOSA | {"change_threshold": 0.15}], {}, {"selector": "quest"}, {"selector": "anchor"}
                    ),
                ],
                *({"budget": budget} | remasking for budget in (64, 128, 256) for remasking in ({}, two)),
            ),
            core,
        ),
        "active": Group(
            "Active tokens",
            "Budget 64, pages by the bound: thresholds of the relative change, and counts.",
            vary(
                [
                    LOSA | {"selector": "quest"},
                    *vary([BY_BOUND], *({"change_threshold": threshold} for threshold in (0.1, 0.2, 0.3))),
                    *vary([LOSA], *({"active": count} for count in counts)),
                    BY_BOUND,
                ],
                *({"budget": 64} | remasking for _, remasking in remasking_of.values()),
            ),
            core,
        ),
        "options": Group(
            "Options",
            "Budget 64: what change is measured against, which tokens can be active, and what ranks pages.",
            vary(
                [
                    *vary(
                        [BY_BOUND],
                        {},
                        {"drift": "previous"},
                        {"candidates": "masked"},
                        {"selector": "anchor"},
                    ),
                    *vary(
                        [counted], {}, {"drift": "refresh"}, {"candidates": "masked"}, {"selector": "anchor"}
                    ),
                ],
                *({"budget": 64} | remasking_of[name][1] for name in ("dynamic", "static-1", "static-2")),
            ),
            core,
        ),
        "masked": Group(
            "Only masked tokens active",
            "A token that was just fixed changed most, and may not have to look again.",
            vary(
                [
                    BY_BOUND,
                    BY_BOUND | {"candidates": "masked"},
                    LOSA | {"candidates": "masked", "selector": "quest"},
                ],
                *(
                    {"budget": budget} | remasking
                    for _, remasking in remasking_of.values()
                    for budget in (64, 128, 256)
                ),
            ),
            masked,
        ),
        "commit": Group(
            "Commit",
            "The pass that writes a block's keys and values, dense and sparse. Blocks of 4 tokens, so that "
            "an answer takes several and later hops begin from what was committed.",
            [
                DENSE | FEW,
                *vary(
                    [BY_BOUND, QUEST],
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
                [BY_BOUND, BY_BOUND | {"first_pass": "sparse"}, QUEST, QUEST | {"first_pass": "dense"}],
                {"budget": 64},
                {"budget": 64} | two,
            ),
            core,
        ),
    }


@dataclass(frozen=True)
class Grid:
    """What is asked of which model.

    Attributes
    ----------
    model : str or None
        As `losart.load` takes it.
    title : str
        What the report calls it.
    style : str
        Of the questions.
    block : int
        The model's block length.
    lengths : tuple of int
    groups : dict of str to Group
    """

    model: str | None
    title: str
    style: str
    block: int
    lengths: tuple[int, ...]
    groups: dict[str, Group]


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


def label(setting: Setting, block: int) -> str:
    """A setting in words; `block` is the model's block length."""
    words = [str(setting["attention"])]
    fixed = {"attention"}
    if setting.get("remasking") == STATIC["remasking"]:
        words.append(f"static, {setting.get('block_length', block) // setting['denoising_steps']} a pass")
        fixed |= {"remasking", "denoising_steps"}
    words += [f"{name} {value}" for name, value in setting.items() if name not in fixed]
    return ", ".join(words)


def cells(
    grid: Grid, groups: Sequence[str] = (), lengths: Sequence[int] = (), tasks: Sequence[str] = ()
) -> list[Asked]:
    """The cells of some groups, the most informative first; one that several groups have occurs once.

    Parameters
    ----------
    grid : Grid
    groups, lengths : sequence
        Only these; all of the grid's if empty.
    tasks : sequence of str
        Only these of a group's tasks; all of them if empty.
    """
    every = (
        Asked(task, length, setting)
        for length in lengths or grid.lengths
        for name in groups or grid.groups
        for setting in grid.groups[name].settings
        for task in grid.groups[name].tasks
        if not tasks or task in tasks
    )
    return list({cell.key: cell for cell in every}.values())


_CORE = ("keys-4", "chain-2", "values", "chains-2")
_KEYS = ("key", "keys-2")
GRIDS = {
    "symbols": Grid(
        model=None,
        title="the checkpoint that comes with losart",
        style="symbols",
        block=16,
        lengths=(4096, 8192, 16384),
        groups=groups_of(16, _CORE, tuple(TASKS), (*_CORE, "chain-3")),
    ),
    "english": Grid(
        model="smollm2",
        title="SmolLM2-135M-Instruct with the adapter that ships with losart",
        style="english",
        block=8,
        lengths=(1024, 4096, 8064),
        groups=groups_of(8, _KEYS, (*_KEYS, "keys-4", "last"), _KEYS),
    ),
}
