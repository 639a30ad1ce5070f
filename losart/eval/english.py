"""The tasks in plain English: access codes of animals among sentences about the country."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable

import numpy as np

from losart.errors import OptionError
from losart.eval.tasks import CHAIN_FACTS, TIMES_SET, Task

TOKENS_PER_FACT = 80  # about a sixth of a document is facts
MAX_FACTS = 200

_ADJECTIVES = """
amber azure brass bronze copper coral crimson ebony emerald golden indigo ivory jade lilac marble olive opal
pearl ruby rusty saffron sandy scarlet silver slate smoky spotted striped tawny velvet violet white
"""
_ANIMALS = """
badger beaver bison camel crane dolphin eagle falcon ferret gazelle hawk hedgehog heron ibex jackal koala
leopard lynx magpie marten moose otter owl panther pelican puffin raven salmon tiger turtle walrus weasel
"""
_PLACES = """
river meadow mill harbour road orchard chapel market bridge quarry lighthouse village pond wood garden wall
stable ferry field canal station
"""
_SUBJECTS = ["A farmer", "The miller", "A traveller", "The ferryman", "A baker", "Someone", "The postman"]
_VERBS = ["walked past", "rested near", "looked across", "wrote about", "asked the way to", "painted"]
_TIMES = ["in the morning", "after the rain", "late in autumn", "before supper", "on a windy day", "at noon"]


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
    facts, question, answer = _facts(rng, task, max(length // TOKENS_PER_FACT, 12))
    # Enough filler for any document: a sentence has 6 tokens or more.
    filler = [_filler(rng) for _ in range(length // 6)]
    positions = np.sort(rng.random(len(facts)))

    def text(sentences: int) -> str:
        parts = filler[:sentences]
        for position, fact in zip(positions[::-1], facts[::-1], strict=True):
            parts.insert(int(position * (sentences + 1)), fact)
        return f"{' '.join(parts)}\n\n{question}"

    fitting = bisect.bisect(range(len(filler) + 1), length, key=lambda n: count_tokens(text(n)))
    if fitting == 0:
        raise OptionError(f"lengths: {length} tokens have no room for {len(facts)} facts and a question")
    return text(fitting - 1), answer


def _filler(rng: np.random.Generator) -> str:
    subject, verb, place, time = (
        str(rng.choice(words)) for words in (_SUBJECTS, _VERBS, _PLACES.split(), _TIMES)
    )
    return f"{subject} {verb} the {place} {time}."


def _facts(rng: np.random.Generator, task: Task, count: int) -> tuple[list[str], str, str]:
    """Facts in a random order, a question about them, its answer."""
    count = min(count, MAX_FACTS)
    chains, repeated = max(3, count // 12), max(1, count // 12)
    singles = max(4, count - chains * CHAIN_FACTS - repeated * TIMES_SET)
    all_names = [f"the {first} {second}" for first in _ADJECTIVES.split() for second in _ANIMALS.split()]
    drawn = rng.permutation(len(all_names))[: chains * CHAIN_FACTS + repeated + singles]
    names = [all_names[i] for i in drawn.tolist()]
    codes = (10000 + rng.permutation(90000)[: chains + repeated * TIMES_SET + singles]).tolist()

    chain_names = [names[i * CHAIN_FACTS : (i + 1) * CHAIN_FACTS] for i in range(chains)]
    rest = names[chains * CHAIN_FACTS :]
    chain_codes = [codes.pop() for _ in chain_names]
    repeated_codes = {name: [codes.pop() for _ in range(TIMES_SET)] for name in rest[:repeated]}
    single_codes = {name: codes.pop() for name in rest[repeated:]}

    # Each with its rank in the order; a key's codes keep the order in which they were set.
    told: list[tuple[float, str]] = []
    for members, code in zip(chain_names, chain_codes, strict=True):
        links = [f"{one.capitalize()} guards {other}." for one, other in itertools.pairwise(members)]
        told += [(rng.random(), sentence) for sentence in [*links, _code(members[-1], code)]]
    for name, values in repeated_codes.items():
        told += zip(
            np.sort(rng.random(TIMES_SET)),
            [_code(name, value, "is now" if i else "is") for i, value in enumerate(values)],
            strict=True,
        )
    told += [(rng.random(), _code(name, code)) for name, code in single_codes.items()]
    facts = [sentence for _, sentence in sorted(told, key=lambda item: item[0])]

    if task.overwritten:
        name = rest[int(rng.integers(repeated))]
        values = repeated_codes[name][::-1][: task.values]
        what = "current access code" if task.values == 1 else "access codes, the newest first,"
        whose = [name]
    else:
        what = "access code" if task.keys == 1 else "access codes"
        if task.hops > 1:
            asked = rng.permutation(chains)[: task.keys].tolist()
            starts = [chain_names[i][CHAIN_FACTS - task.hops] for i in asked]
            guarded = " guarded by ".join(["the animal"] * (task.hops - 1))
            whose = [f"{guarded} guarded by {start}" for start in starts]
            values = [chain_codes[i] for i in asked]
        else:
            whose = [rest[repeated + i] for i in rng.permutation(singles)[: task.keys].tolist()]
            values = [single_codes[name] for name in whose]
    question = (
        f"What {'is' if len(values) == 1 else 'are'} the {what} of {_and(whose)}? "
        "Answer with the number alone; if there are several, in the order asked, with commas."
    )
    return facts, question, ", ".join(map(str, values))


def _code(name: str, code: int, verb: str = "is") -> str:
    return f"The access code of {name} {verb} {code}."


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
