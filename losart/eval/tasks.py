"""The tasks: what a question asks of the facts in a document."""

from __future__ import annotations

from dataclasses import dataclass

from losart.errors import OptionError


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes
    ----------
    keys : int
        Keys asked at once.
    hops : int
        Facts from a key to its answer: the value of one is the key of the next. All values along the
        way are part of the answer.
    values : int
        Values asked of a key, the one set last first.
    overwritten : bool
        Whether the key has been set more than once.
    """

    name: str
    keys: int = 1
    hops: int = 1
    values: int = 1
    overwritten: bool = False

    @property
    def pairs(self) -> int:
        """Values in the answer."""
        return self.keys * self.hops * self.values


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("key"),
        Task("keys-2", keys=2),
        Task("keys-4", keys=4),
        Task("values", values=3, overwritten=True),
        Task("last", overwritten=True),
        Task("chain-2", hops=2),
        Task("chain-3", hops=3),
        Task("chains-2", keys=3, hops=2),
    )
}
TIMES_SET = 3  # of an overwritten key
CHAIN_FACTS = 3  # of a chain


def find_task(name: str) -> Task:
    """The task of a name.

    Raises
    ------
    OptionError
        When there is none.
    """
    if name not in TASKS:
        raise OptionError(f"tasks must be among {', '.join(TASKS)}, not {name!r}")
    return TASKS[name]
