"""Conversations whose answers stand far back: facts in a document, and parts of the conversation itself.

Facts are in the manner of losart.eval's English tasks, about names, and among sentences, that evaluation
does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from losart.eval.english import TOKENS_PER_FACT, Facts, Words
from losart.eval.tasks import TASKS
from losart.loaders.tokenizer import Tokenizer

from .chat_format import ChatFormat
from .texts import Texts

_ADJECTIVES = """
able brave bright busy calm careful cheerful clever curious daring eager early famous gentle grateful happy
honest humble jolly kind lively lonely loyal lucky modest noble patient polite proud quick quiet serious shy
skilful sleepy strong tall tired tiny wise witty young
"""
_PLACES = """
library museum airport theatre tower office kitchen school hospital park hotel square tunnel temple castle
workshop cellar stadium island beach desert valley glacier
"""
_SUBJECTS = ("A student", "The doctor", "A tourist", "The engineer", "A painter", "Nobody", "The captain")
_VERBS = ("drove to", "waited outside", "took a photo of", "dreamed of", "cleaned", "ran around", "left")
_TIMES = ("at dawn", "on Monday", "in spring", "after lunch", "during the storm", "last week", "at midnight")


def _words(nouns: str, **given: str) -> Words:
    return Words(_ADJECTIVES, nouns, _PLACES, _SUBJECTS, _VERBS, _TIMES, **given)


WORDS = (
    _words(
        """
        ant bear bee cat cobra cow crab deer dog duck eel fox frog goat goose horse lion lizard monkey
        mouse pig rabbit rat robin shark sheep snail spider squid swan wasp wolf worm zebra
        """,
        kind="animal",
        value="access code",
        link="guards",
        linked="guarded",
    ),
    _words(
        """
        actor barber butcher carpenter chemist clerk cook dancer dentist driver editor farmer fisher
        gardener judge lawyer mason nurse pilot plumber poet porter sailor singer tailor teacher waiter
        writer
        """,
        kind="worker",
        value="locker number",
        link="trains",
        linked="trained",
    ),
    _words(
        """
        banjo bassoon bell cello clarinet cymbal drum fiddle flute gong guitar harp horn lute oboe organ
        piano piccolo trombone trumpet tuba viola violin xylophone
        """,
        kind="instrument",
        value="shelf mark",
        link="accompanies",
        linked="accompanied",
    ),
    _words(
        """
        barge brig canoe cutter dinghy freighter frigate galley gondola kayak liner lugger raft schooner
        sloop steamer submarine tanker trawler tug yacht
        """,
        kind="ship",
        value="berth code",
        link="follows",
        linked="followed",
    ),
)
TASK_SHARES = {
    **dict.fromkeys(("keys-4", "values", "chain-2", "chain-3", "chains-2"), 1.0),
    **{"key": 3.0, "keys-2": 3.0, "last": 2.0},
}
ASKS_FOR_NUMBERS = 0.7  # share of the questions
LONGEST_REPEATED = 160  # tokens
Pair = tuple[list[int], list[bool]]


@dataclass
class RecallTexts:
    """Writes such conversations.

    Parameters
    ----------
    tokenizer : Tokenizer
    chat : ChatFormat
    quoted : float
        Share of answers to questions for numbers alone that quote the facts nevertheless.
    """

    tokenizer: Tokenizer
    chat: ChatFormat
    quoted: float = 0.0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        backend = self.tokenizer.backend
        return [one.ids for one in backend.encode_batch(list(texts), add_special_tokens=False)]

    @cached_property
    def _filler(self) -> list[list[int]]:
        """Every sentence without a fact, with a space before it."""
        return self.encode(
            [
                f" {subject} {verb} the {place} {time}."
                for subject in _SUBJECTS
                for verb in _VERBS
                for place in _PLACES.split()
                for time in _TIMES
            ]
        )

    @cached_property
    def _filler_lengths(self) -> NDArray[np.int64]:
        return np.array([len(sentence) for sentence in self._filler])

    def facts(self, rng: np.random.Generator, length: int) -> Pair:
        """A document of facts with questions about it, about `length` tokens in all.

        Not more, unless its fewest facts with one question take more.
        """
        words = WORDS[int(rng.integers(len(WORDS)))]
        facts = Facts(rng, length // int(rng.integers(TOKENS_PER_FACT // 3, TOKENS_PER_FACT + 1)), words)
        names, shares = list(TASK_SHARES), np.array(list(TASK_SHARES.values()))
        count = int(np.clip(length // 80, 2, 40))
        asked = [
            self._asked(rng, facts, str(name)) for name in rng.choice(names, count, p=shares / shares.sum())
        ]
        asked[0] = f"\n\n{asked[0][0]}", asked[0][1]
        questions, answers = (self.encode(texts) for texts in zip(*asked, strict=True))
        sentences = self.encode([f" {sentence}" for sentence in facts.sentences])
        between = len(self.chat.to_answer) + len(self.chat.to_question)
        taken = [len(q) + len(a) + between for q, a in zip(questions, answers, strict=True)]
        room = length - len(self.chat.before) - sum(map(len, sentences)) - sum(taken) - 2
        while room < 0 and len(taken) > 1:
            room += taken.pop()
        del questions[len(taken) :], answers[len(taken) :]
        drawn = rng.integers(len(self._filler), size=max(room, 0) // 6 + 1)
        drawn = drawn[np.cumsum(self._filler_lengths[drawn]) <= room].tolist()
        parts = [self._filler[number] for number in drawn]
        places = np.sort(rng.integers(len(parts) + 1, size=len(sentences))).tolist()
        for place, sentence in zip(places[::-1], sentences[::-1], strict=True):
            parts.insert(place, sentence)
        head = self.tokenizer.decode(parts[0]).lstrip(" ")  # no space before the first
        document = [*self.encode([head])[0], *(token for part in parts[1:] for token in part)]
        questions[0] = document + questions[0]
        return self.chat.conversation(list(zip(questions, answers, strict=True)))

    def _asked(self, rng: np.random.Generator, facts: Facts, task: str) -> tuple[str, str]:
        """A question and its answer: numbers alone if it asks for them, mostly, else what the text says."""
        question, answer, told = facts.ask(rng, TASKS[task])
        if rng.random() < ASKS_FOR_NUMBERS:
            return question, " ".join(told) if rng.random() < self.quoted else answer
        return question[: question.index("?") + 1], " ".join(told)

    def repeats(
        self, rng: np.random.Generator, length: int, turns: Sequence[tuple[list[int], list[int]]]
    ) -> Pair:
        """A conversation of others' turns, in which the user wants earlier answers or questions repeated.

        About `length` tokens, not more.
        """
        between = len(self.chat.to_answer) + len(self.chat.to_question)
        room = length - len(self.chat.before) - 2
        told: list[tuple[list[int], list[int]]] = []
        said: list[tuple[list[int], list[int]]] = []
        for turn in turns:
            new = [turn]
            said.append(turn)
            if len(said) > 2 and rng.random() < 0.4:
                new.append(self._repeat(rng, said))
            for question, answer in new:
                room -= len(question) + len(answer) + between
                if room < 0:
                    return self.chat.conversation(told)
                told.append((question, answer))
        return self.chat.conversation(told)

    def _repeat(
        self, rng: np.random.Generator, said: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[int]]:
        question, answer = said[int(rng.integers(len(said)))]
        kind = int(rng.integers(3))
        text = self.tokenizer.decode(answer)
        if kind == 0:
            asked = f"Repeat your answer to: {self.tokenizer.decode(question)}"
            return self.encode([asked])[0], answer[:LONGEST_REPEATED]
        words = text.split(" ")
        if kind == 1 or len(words) < 24:
            begins = self.tokenizer.decode(answer[:8])
            return self.encode([f'What had I asked when you answered "{begins}..."?'])[0], question
        at = int(rng.integers(len(words) - 16))
        passage = " ".join(words[at : at + 8])
        follows = " ".join(words[at + 8 : at + 48])
        asked, quoted = self.encode([f'Quote what follows "{passage}" in your answer.', follows])
        return asked, quoted


def single_turns(texts: Texts, chat: ChatFormat) -> Iterator[tuple[list[int], list[int]]]:
    """Question and answer of each conversation's first turn that is whole."""
    start, gap = len(chat.before), len(chat.to_answer)
    for number in range(len(texts)):
        ids, answers = texts[number]
        begin = int(np.argmax(answers))
        ends = np.flatnonzero(ids[begin:] == chat.end_id)
        if not answers.any() or not len(ends) or begin - gap <= start:
            continue
        yield ids[start : begin - gap].tolist(), ids[begin : begin + ends[0]].tolist()
