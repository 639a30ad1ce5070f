"""LongBench's files (arXiv 2308.14508): data/*.jsonl, dataset2prompt.json and dataset2maxlen.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losart.errors import DataError
from losart.loaders.json_files import read_json_object, read_text

# Scored by qa_f1_score in LongBench's eval.py; the first five are the LoSA paper's.
DATASETS = ("hotpotqa", "triviaqa", "narrativeqa", "qasper", "multifieldqa_en", "2wikimqa", "musique")
# Their prompts show how to answer: LongBench's pred.py puts no chat template around them.
PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")


@dataclass(frozen=True)
class Item:
    """One question of a data set.

    Attributes
    ----------
    prompt : str
        The data set's prompt with the item's context and question, not yet truncated.
    answers : list of str
        Any of them is right.
    """

    prompt: str
    answers: list[str]


@dataclass(frozen=True)
class Dataset:
    """A data set's questions, and how many new tokens an answer may have."""

    name: str
    items: list[Item]
    max_new_tokens: int


def read_dataset(directory: Path, name: str, samples: int | None = None) -> Dataset:
    """Read one data set, or its first questions.

    Raises
    ------
    DataError
        The files are missing or not of LongBench's form.
    """
    if name not in DATASETS:
        raise DataError(f"losart scores the data sets {', '.join(DATASETS)} of LongBench, not {name!r}")
    prompts, limits = (_config(directory, file) for file in ("dataset2prompt.json", "dataset2maxlen.json"))
    template, limit = prompts.get(name), limits.get(name)
    if not isinstance(template, str) or not isinstance(limit, int) or limit < 1:
        raise DataError(
            f"{directory}: no prompt or no number of new tokens for {name!r} in its configuration"
        )
    file = directory / "data" / f"{name}.jsonl"
    items: list[Item] = []
    for line, row in _rows(file):
        if samples is not None and len(items) == samples:
            break
        answers = row.get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{line}: answers must be a list of strings")
        try:
            items.append(Item(template.format(**row), answers))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(f"{line}: does not fit the prompt of {name!r}: {error!r}") from error
    if not items:
        raise DataError(f"{file}: no questions")
    return Dataset(name, items, limit)


def find_datasets(directory: Path) -> list[str]:
    """The data sets in `directory` that can be scored.

    Raises
    ------
    DataError
        When there is none.
    """
    datasets = [name for name in DATASETS if (directory / "data" / f"{name}.jsonl").is_file()]
    if not datasets:
        raise DataError(f"{directory}: no data/NAME.jsonl of LongBench for any of {', '.join(DATASETS)}")
    return datasets


def _config(directory: Path, name: str) -> dict[str, Any]:
    beside, inside = directory / name, directory / "config" / name
    return read_json_object(beside if beside.exists() else inside).values


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's number, for messages, and its object."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}: not a JSON object")
        yield f"{file}, line {number}", row
