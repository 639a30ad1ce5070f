"""Texts to train on: tokens, and which of them are to be predicted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losart.errors import DataError

from .base_model import Base
from .chat_format import ChatFormat


@dataclass(frozen=True)
class Texts:
    """Texts one after the other.

    Attributes
    ----------
    ids : int32 [tokens]
    answers : bool [tokens]
        The assistant's tokens, with the end token of each answer; of plain text all.
    starts : int64 [texts + 1]
        Where each text starts, and where the last ends.
    """

    ids: NDArray[np.int32]
    answers: NDArray[np.bool_]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        part = slice(self.starts[number], self.starts[number + 1])
        return self.ids[part], self.answers[part]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return np.diff(self.starts)

    def chosen(self, numbers: Iterable[int]) -> Texts:
        """Some of the texts."""
        return collect(self[int(number)] for number in numbers)

    def save(self, file: Path) -> None:
        """Write them."""
        file.parent.mkdir(parents=True, exist_ok=True)
        small = np.uint16 if self.ids.size == 0 or self.ids.max() < 2**16 else np.int32
        np.savez(file, ids=self.ids.astype(small), answers=np.packbits(self.answers), starts=self.starts)


def collect(texts: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Texts:
    """Texts of pairs of ids and answers."""
    pairs = [(np.asarray(ids, np.int32), np.asarray(answers, np.bool_)) for ids, answers in texts]
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in pairs])]).astype(np.int64)
    empty = [np.empty(0, np.int32)], [np.empty(0, np.bool_)]
    ids, answers = zip(*pairs, strict=True) if pairs else empty
    return Texts(np.concatenate(ids), np.concatenate(answers), starts)


def load_texts(file: Path) -> Texts:
    """What `Texts.save` wrote."""
    with np.load(file) as saved:
        ids = saved["ids"].astype(np.int32)
        return Texts(ids, np.unpackbits(saved["answers"], count=len(ids)).astype(bool), saved["starts"])


def read_jsonl(file: Path, base: Base, chat: ChatFormat | None, longest: int) -> Texts:
    """A user's own texts: lines {"messages": [...]} of user and assistant in turn, or {"text": "..."}.

    Raises
    ------
    DataError
        A line is neither.
    """

    def texts() -> Iterable[tuple[list[int], list[bool]]]:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    ids, answers = _tokens(json.loads(line), base, chat)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise DataError(f"{file}, line {number}: no messages and no text: {error!r}") from error
                yield ids[:longest], answers[:longest]

    return collect(texts())


def _tokens(row: dict[str, object], base: Base, chat: ChatFormat | None) -> tuple[list[int], list[bool]]:
    if "text" in row:
        ids = [*base.tokenizer.encode(str(row["text"]), special=False), base.end_id]
        return ids, [True] * len(ids)
    if chat is None:
        raise ValueError("messages need a chat template")
    messages: list[dict[str, str]] = row["messages"]  # type: ignore[assignment]
    roles = [message["role"] for message in messages]
    if len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise ValueError("messages are not of user and assistant in turn")
    contents = [base.tokenizer.encode(message["content"], special=False) for message in messages]
    return chat.conversation(list(zip(contents[::2], contents[1::2], strict=True)))
