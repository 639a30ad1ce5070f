"""Prompts of a Ray dataset, answered by engines on many GPUs or hosts: a class for `map_batches`.

dataset.map_batches(
    losart.ray.Generate,
    fn_constructor_kwargs={"model": "path/to/SDAR-8B-Chat", "device": "cuda", "max_new_tokens": 256},
    compute=ray.data.ActorPoolStrategy(
        size=8, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    ),
    num_gpus=1,
    batch_size=256,
    batch_format="pyarrow",
)

docs/guide/offline.md says what to choose and why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow

from losart.api.engine import Engine
from losart.api.model import load
from losart.api.requests import answers, request
from losart.config.options import OPTIONS
from losart.errors import DataError, LosartError, OptionError
from losart.observe.step import GenerationResult, Stats

Answer = GenerationResult | LosartError

STATS = {field.name: np.int64 if field.type == "int" else np.float64 for field in dataclasses.fields(Stats)}


class Generate:
    """Answers the prompts of batches, with a model and an engine that are loaded once.

    A batch has its columns, and those that follow. What is wrong with a row alone, its prompt or its options,
    or that it does not fit into memory, is told in its column of errors; its other columns are then empty
    texts and lists, and zeros. All else is raised, and ends Ray's job.

    Calls of several threads share the engine.

    Parameters
    ----------
    model, device, dtype, weights, kv, adapter, merge, activations, deterministic
        As of :func:`losart.load`.
    max_sequences, kv_memory
        As of :class:`losart.Engine`.
    prefixes : sequence of path
        Files of :meth:`losart.Engine.save_prefix`.
    prompt : str
        The column of prompts: text, chat messages or token ids.
    chat : bool
        Take text as a user's message.
    key : str
        The column that tells rows apart for their seeds; where there is none, the prompt does.
    row_options : sequence of str
        Options of :meth:`losart.Model.generate` that are columns of their own names; where a row's is null
        the one in `options` holds.
    text, finish_reason, token_ids, error : str
        Names of the columns of answers. `error` is empty where there is none.
    stats : sequence of str
        Fields of :class:`losart.Stats` that become columns of their own names.
    **options
        Of :meth:`losart.Model.generate`. `seed`, 0 by default, and the row's key make the row's seed, unless
        that is one of the row's options.

    Raises
    ------
    OptionError
        An option or a name is wrong for all rows.
    LosartError
        As of :func:`losart.load`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        weights: str = "auto",
        kv: str = "auto",
        adapter: str | os.PathLike[str] | None = None,
        merge: str = "dtype",
        activations: str = "auto",
        deterministic: bool = False,
        max_sequences: int | None = None,
        kv_memory: int | None = None,
        prefixes: Sequence[str | os.PathLike[str]] = (),
        prompt: str = "prompt",
        chat: bool = False,
        key: str = "id",
        row_options: Sequence[str] = (),
        text: str = "text",
        finish_reason: str = "finish_reason",
        token_ids: str = "token_ids",
        error: str = "error",
        stats: Sequence[str] = ("prompt_tokens", "reused_tokens", "new_tokens", "mean_sequences"),
        **options: Any,
    ) -> None:
        if unknown := set(stats) - STATS.keys():
            raise OptionError(
                f"stats: there is no {', '.join(sorted(unknown))}; there are {', '.join(STATS)}"
            )
        self._answers = (text, finish_reason, token_ids, error)
        self._stats = tuple(stats)
        columns = (*self._answers, *self._stats)
        if len({*columns}) < len(columns):
            raise OptionError(f"columns of the same name: {', '.join(columns)}")
        if "logprobs" in {*options, *row_options}:
            raise OptionError("logprobs: answers have no column for them")
        loaded = load(
            model,
            device,
            dtype,
            deterministic=deterministic,
            weights=weights,
            kv=kv,
            adapter=adapter,
            merge=merge,
            activations=activations,
        )
        if unknown := set(row_options) - {*OPTIONS, *dict(loaded.config.decoding.names)}:
            raise OptionError(f"row_options: there is no option {', '.join(sorted(unknown))}")
        loaded.session(**options)  # which refuses options that are wrong for every row
        self._prompt, self._chat, self._key, self._row_options = prompt, chat, key, tuple(row_options)
        self._seed = options.pop("seed", None) or 0
        self._options = options
        self.engine = Engine(loaded, max_sequences=max_sequences, kv_memory=kv_memory, prefill_first=True)
        for file in prefixes:
            self.engine.load_prefix(file)

    def __call__(self, batch: Any) -> Any:
        """The batch, a table of Arrow or a dict of arrays, with the answers.

        Raises
        ------
        OptionError
            The batch has no column of prompts, or one of an answer's name.
        """
        is_table = isinstance(batch, pyarrow.Table)
        names = batch.column_names if is_table else list(batch)
        if self._prompt not in names:
            raise OptionError(f"there is no column {self._prompt!r}; there are {', '.join(names)}")
        if taken := {*self._answers, *self._stats} & {*names}:
            raise OptionError(f"there are columns {', '.join(sorted(taken))}: give the answers' other names")
        read = [name for name in names if name in (self._prompt, self._key, *self._row_options)]
        values = [batch[name].to_pylist() if is_table else list(batch[name]) for name in read]
        rows = [
            {
                name: plain
                for name, value in zip(read, row, strict=True)
                if (plain := _plain(value)) is not None
            }
            for row in zip(*values, strict=True)
        ]
        columns = self._columns(self._answer(rows))
        if not is_table:
            return batch | columns
        for name, column in columns.items():
            batch = batch.append_column(name, pyarrow.array(column, self._type(name)))
        return batch

    def _answer(self, rows: list[dict[str, Any]]) -> list[Answer]:
        found: dict[int, Answer] = {}
        # Prompts that begin alike come one after another, while what they have in common is held.
        order = sorted(range(len(rows)), key=lambda index: _text(rows[index].get(self._prompt)))

        def asked() -> Iterator[tuple[int, Any, dict[str, Any]]]:
            for index in order:
                try:
                    prompt, own = request(rows[index], self._prompt, self._row_options, self._chat)
                except DataError as error:
                    found[index] = error
                else:
                    own.setdefault("seed", row_seed(self._seed, rows[index].get(self._key, prompt)))
                    yield index, prompt, self._options | own

        for index, answer in answers(self.engine, asked()):
            found[index] = answer
        return [found[index] for index in range(len(rows))]

    def _columns(self, found: list[Answer]) -> dict[str, np.ndarray]:
        """The answers by columns, none of them null: a null alone would give its block another type."""
        told = [("", "", [], _told(one)) if isinstance(one, LosartError) else _given(one) for one in found]
        columns = {
            name: np.fromiter((row[place] for row in told), object, len(told))
            for place, name in enumerate(self._answers)
        }
        for name in self._stats:
            figures = [0 if isinstance(one, LosartError) else getattr(one.stats, name) for one in found]
            columns[name] = np.array(figures, STATS[name])
        return columns

    def _type(self, name: str) -> pyarrow.DataType:
        if name in self._stats:
            return pyarrow.from_numpy_dtype(STATS[name])
        return pyarrow.list_(pyarrow.int32()) if name == self._answers[2] else pyarrow.string()


def row_seed(seed: int, key: Any) -> int:
    """The seed of the row with this key, on every worker; a column of 64-bit integers can have it."""
    text = json.dumps([seed, key], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _given(result: GenerationResult) -> tuple[str, str, list[int], str]:
    return result.text, result.finish_reason, result.token_ids, ""


def _told(error: LosartError) -> str:
    return f"{type(error).__name__}: {error}"


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else repr(prompt)


def _plain(value: Any) -> Any:
    """A cell as JSON has it: without arrays, and without the nulls that tables fill objects up with."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None  # as an array has it where a column of numbers has nulls
    if isinstance(value, dict):
        return {name: plain for name, one in value.items() if (plain := _plain(one)) is not None}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [_plain(one) for one in value]
    return value
