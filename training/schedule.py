"""What training does when: stages of growing length, tasks, learning rate, auxiliary losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from losart.eval.tasks import TASKS

WARM_UP = 50  # steps


@dataclass(frozen=True)
class Stage:
    """Rows of one length, until they are learnt.

    Attributes
    ----------
    tokens : int
        Of a prompt.
    rows : int
        Of a step.
    questions : int
        To a document.
    enough : float
        Median of the tasks' recall at which the next stage begins.
    share : float
        Of the steps of the last stage, which are of all lengths, beside the other stages' shares.
    """

    tokens: int
    rows: int
    questions: int
    enough: float = 0.9
    share: float = 1.0


STAGES = (
    Stage(256, 96, 8, share=0.3),
    Stage(1024, 48, 16),
    Stage(4096, 12, 48),
    Stage(8192, 6, 64),
    Stage(16384, 3, 64, share=0.5),
)
# What came out weakest when all tasks were drawn alike.
TASK_WEIGHTS = {**dict.fromkeys(TASKS, 1.0), "keys-4": 2.0, "last": 2.0}


def learning_rate(step: int, share: float, peak: float) -> float:
    """Warm-up, then the peak until half of the time, then down to a twentieth of it."""
    decay = (
        1.0 if share < 0.5 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - 0.5) / 0.5)))
    )
    return peak * min(1.0, (step + 1) / WARM_UP) * decay


def auxiliary_weight(share: float) -> float:
    """Of the losses that only training has: they fade out between 70% and 90% of the time."""
    return min(1.0, max(0.0, (0.9 - share) / 0.2))
