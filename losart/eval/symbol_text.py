"""Symbolic documents and questions as text that the tokenizer turns into the same ids."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable

import numpy as np

from losart.eval.symbols import FACT
from losart.eval.vocabulary import FIRST_SYMBOL, vocabulary

COLUMNS = 100


def document_text(ids: Iterable[int]) -> str:
    """A document in lines: facts as `Baki-zomu: tafi-podi.` among words."""
    words, names = [], vocabulary()
    tokens = iter(ids)
    for token in tokens:
        if token >= FIRST_SYMBOL:
            a, b, c, d = (names[part] for part in (token, *itertools.islice(tokens, FACT - 1)))
            words.append(f"{a.capitalize()}-{b}: {c}-{d}.")
        else:
            words.append(names[token])
    return textwrap.fill(" ".join(words), COLUMNS, break_on_hyphens=False, break_long_words=False)


def question_text(ids: Iterable[int]) -> str:
    """A question in a line: keys as `Baki-zomu`, then marks: `Baki-zomu >> ????????????`."""
    names = vocabulary()
    text = " ".join(names[token] for token in ids)
    text = re.sub(r"([a-z]+) ([a-z]+)", lambda key: f"{key[1].capitalize()}-{key[2]}", text)
    return re.sub(r"(\W) (?=\1)", r"\1", text)


def prompt_text(document: np.ndarray, question: np.ndarray) -> str:
    """The prompt of a document and a question about it, as ids [tokens] and [16]."""
    return f"{document_text(document)}\n\n{question_text(question)}\n"


def answer_text(ids: Iterable[int]) -> str:
    """The words of an answer, without its end and padding: what the tokenizer decodes it to."""
    names = vocabulary()
    return " ".join(names[token] for token in ids if token >= FIRST_SYMBOL)
