"""The tasks in plain English: access codes of animals among sentences about the country."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from losart.errors import OptionError
from losart.eval.tasks import CHAIN_FACTS, TIMES_SET, Task

TOKENS_PER_FACT = 80  # about a sixth of a document is facts
MAX_FACTS = 200


@dataclass(frozen=True)
class Words:
    """What documents are about.

    Attributes
    ----------
    adjectives, nouns : str
        Of which names are made, separated by spaces.
    places : str
        Of the sentences between the facts, separated by spaces.
    subjects, verbs, times : tuple of str
        Likewise.
    kind : str
        What the nouns are.
    value : str
        What is told of a name.
    link, linked : str
        What one name does to another, and what is done to that one.
    """

    adjectives: str
    nouns: str
    places: str
    subjects: tuple[str, ...]
    verbs: tuple[str, ...]
    times: tuple[str, ...]
    kind: str
    value: str
    link: str
    linked: str

    @property
    def names(self) -> list[str]:
        """All names."""
        return [f"the {first} {second}" for first in self.adjectives.split() for second in self.nouns.split()]

    def filler(self, rng: np.random.Generator) -> str:
        """A sentence without a fact."""
        subject, verb, place, time = (
            str(rng.choice(words)) for words in (self.subjects, self.verbs, self.places.split(), self.times)
        )
        return f"{subject} {verb} the {place} {time}."

    def told(self, name: str, code: int, verb: str = "is") -> str:
        """A sentence with a fact."""
        return f"The {self.value} of {name} {verb} {code}."


EVALUATION_WORDS = Words(
    adjectives="""
    amber azure brass bronze copper coral crimson ebony emerald golden indigo ivory jade lilac marble
    olive opal pearl ruby rusty saffron sandy scarlet silver slate smoky spotted striped tawny velvet
    violet white
    """,
    nouns="""
    badger beaver bison camel crane dolphin eagle falcon ferret gazelle hawk hedgehog heron ibex jackal
    koala leopard lynx magpie marten moose otter owl panther pelican puffin raven salmon tiger turtle
    walrus weasel
    """,
    places="""
    river meadow mill harbour road orchard chapel market bridge quarry lighthouse village pond wood
    garden wall stable ferry field canal station
    """,
    subjects=("A farmer", "The miller", "A traveller", "The ferryman", "A baker", "Someone", "The postman"),
    verbs=("walked past", "rested near", "looked across", "wrote about", "asked the way to", "painted"),
    times=(
        "in the morning",
        "after the rain",
        "late in autumn",
        "before supper",
        "on a windy day",
        "at noon",
    ),
    kind="animal",
    value="access code",
    link="guards",
    linked="guarded",
)


def numbers(text: str) -> str:
    """The numbers of a text in their order: the part of an answer that is checked."""
    return " ".join(re.findall(r"\d+", text))


def make_text(
    rng: np.random.Generator, task: Task, length: int, count_tokens: Callable[[str], int]
) -> tuple[str, str]:
    """A document with a question after it.

    Parameters
    ----------
    rng : numpy.random.Generator
    task : Task
    length : int
        Tokens at most; the text is less than a sentence shorter.
    count_tokens : callable
        Of a prompt with this text.

    Returns
    -------
    text, answer : str

    Raises
    ------
    OptionError
        `length` has no room for the facts.
    """
    facts = Facts(rng, max(length // TOKENS_PER_FACT, 12))
    question, answer, _ = facts.ask(rng, task)
    # Enough filler for any document: a sentence has 6 tokens or more.
    filler = [EVALUATION_WORDS.filler(rng) for _ in range(length // 6)]
    positions = np.sort(rng.random(len(facts.sentences)))

    def text(sentences: int) -> str:
        parts = filler[:sentences]
        for position, fact in zip(positions[::-1], facts.sentences[::-1], strict=True):
            parts.insert(int(position * (sentences + 1)), fact)
        return f"{' '.join(parts)}\n\n{question}"

    fitting = bisect.bisect(range(len(filler) + 1), length, key=lambda n: count_tokens(text(n)))
    if fitting == 0:
        raise OptionError(
            f"lengths: {length} tokens have no room for {len(facts.sentences)} facts and a question"
        )
    return text(fitting - 1), answer


class Facts:
    """The facts of a document, of all kinds, and questions about them.

    Parameters
    ----------
    rng : numpy.random.Generator
    count : int
        About so many.
    words : Words, optional

    Attributes
    ----------
    sentences : list of str
        In the order in which they are told.
    """

    def __init__(self, rng: np.random.Generator, count: int, words: Words = EVALUATION_WORDS) -> None:
        self.words = words
        count = min(count, MAX_FACTS)
        chains, repeated = max(3, count // 12), max(1, count // 12)
        singles = max(4, count - chains * CHAIN_FACTS - repeated * TIMES_SET)
        all_names = words.names
        drawn = rng.permutation(len(all_names))[: chains * CHAIN_FACTS + repeated + singles]
        names = [all_names[i] for i in drawn.tolist()]
        codes = (10000 + rng.permutation(90000)[: chains + repeated * TIMES_SET + singles]).tolist()

        self._chains = [names[i * CHAIN_FACTS : (i + 1) * CHAIN_FACTS] for i in range(chains)]
        rest = names[chains * CHAIN_FACTS :]
        self._of_chains = [codes.pop() for _ in self._chains]
        self._repeated = {name: [codes.pop() for _ in range(TIMES_SET)] for name in rest[:repeated]}
        self._singles = {name: codes.pop() for name in rest[repeated:]}
        self.sentences = [sentence for _, sentence in sorted(self._told(rng), key=lambda item: item[0])]

    def _told(self, rng: np.random.Generator) -> list[tuple[float, str]]:
        """Each sentence with its rank in the order; a key's codes keep the order in which they were set."""
        words = self.words
        told: list[tuple[float, str]] = []
        for members, code in zip(self._chains, self._of_chains, strict=True):
            links = [
                f"{one.capitalize()} {words.link} {other}." for one, other in itertools.pairwise(members)
            ]
            told += [(rng.random(), sentence) for sentence in [*links, words.told(members[-1], code)]]
        for name, values in self._repeated.items():
            told += zip(
                np.sort(rng.random(TIMES_SET)),
                [words.told(name, value, "is now" if i else "is") for i, value in enumerate(values)],
                strict=True,
            )
        return told + [(rng.random(), words.told(name, code)) for name, code in self._singles.items()]

    def ask(self, rng: np.random.Generator, task: Task) -> tuple[str, str, list[str]]:
        """A question, its answer, and the sentences that tell the values in it."""
        words = self.words
        if task.overwritten:
            name = list(self._repeated)[int(rng.integers(len(self._repeated)))]
            values = self._repeated[name][::-1][: task.values]
            what = f"current {words.value}" if task.values == 1 else f"{words.value}s, the newest first,"
            whose = [name]
            holders = [name] * task.values
            verbs = ["is now"] * (TIMES_SET - 1) + ["is"]
        else:
            verbs = ["is"] * task.keys
            what = words.value if task.keys == 1 else f"{words.value}s"
            if task.hops > 1:
                asked = rng.permutation(len(self._chains))[: task.keys].tolist()
                starts = [self._chains[i][CHAIN_FACTS - task.hops] for i in asked]
                linked = f" {words.linked} by ".join([f"the {words.kind}"] * (task.hops - 1))
                whose = [f"{linked} {words.linked} by {start}" for start in starts]
                values = [self._of_chains[i] for i in asked]
                holders = [self._chains[i][-1] for i in asked]
            else:
                names = list(self._singles)
                whose = [names[i] for i in rng.permutation(len(names))[: task.keys].tolist()]
                values = [self._singles[name] for name in whose]
                holders = whose
        question = (
            f"What {'is' if len(values) == 1 else 'are'} the {what} of {_and(whose)}? "
            "Answer with the number alone; if there are several, in the order asked, with commas."
        )
        told = [words.told(*one) for one in zip(holders, values, verbs, strict=False)]
        return question, ", ".join(map(str, values)), told


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
