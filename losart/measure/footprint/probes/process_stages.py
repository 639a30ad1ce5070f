"""What a process spends its time and memory on, from before it was started.

Imports little, since that is part of what is measured.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

FIELDS = ("VmRSS", "VmHWM", "RssAnon", "RssFile")


class Stages:
    """Seconds of named stages that follow each other, and the memory at the end of each.

    The command line has the request in JSON: `checkpoint`, `device`, `began` (the monotonic time at
    which the process was started), `prompt_tokens`, `new_tokens`, `block_length`, `mask_token_id`,
    `confidence_threshold`, and `watch`: whether the peak of RssAnon is sampled too, which the system
    does not keep.
    """

    def __init__(self) -> None:
        self.request = json.loads(sys.argv[-1])
        self.checkpoint, self.device = self.request["checkpoint"], self.request["device"]
        self.device_memory: Callable[[], int] | None = None
        self._last = self.request["began"]
        self._seconds: dict[str, float] = {}
        self._memory: dict[str, dict[str, int]] = {}
        self._watch = MemoryWatch() if self.request["watch"] else None
        self.end("python")

    def prompt(self) -> list[int]:
        """Ids, the same for all, text in a vocabulary of any size."""
        return [(97 * i) % 251 for i in range(self.request["prompt_tokens"])]

    def end(self, stage: str) -> None:
        """Call at the end of a stage: the next one begins."""
        now = time.monotonic()
        self._seconds[stage] = now - self._last
        memory = resident_memory()
        if self._watch:
            memory["peak RssAnon"] = self._watch.sample()
        if self.device_memory:
            memory["device"] = self.device_memory()
        self._memory[stage] = memory
        self._last = time.monotonic()

    def report(self, tokens: list[int], weights: dict[str, int], kv: dict[str, int]) -> None:
        """Print all of it as JSON.

        `tokens` are what the process was started for, `weights` and `kv` the bytes of matrices, and of keys
        and values in the end, by the formats that they are held in.
        """
        held = {"weights": weights, "kv": kv}
        print(json.dumps({"tokens": tokens, **held, "seconds": self._seconds, "bytes": self._memory}))


class MemoryWatch(threading.Thread):
    """The peak of what the process itself holds, RssAnon, sampled every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.sample()
            time.sleep(0.002)

    def sample(self) -> int:
        """The peak up to now, in bytes."""
        self._peak = max(self._peak, resident_memory().get("RssAnon", 0))
        return self._peak


def resident_memory() -> dict[str, int]:
    """Bytes by field of /proc/self/status, as far as this system has them.

    RssAnon is what the process itself holds; RssFile, pages of mapped files, the system can drop.
    """
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return {}
    return {name: int(fields[name].split()[0]) * 1024 for name in FIELDS if name in fields}
