"""What a process spends its time and memory on, from before it was started; for first_token_*.py.

Imports little, since that is part of what is measured.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

PROMPT_TOKENS = 512
STATUS = Path("/proc/self/status")
FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")


class Stages:
    """Seconds of named stages that follow each other.

    The command line has the checkpoint, the device and the monotonic time at which the process was
    started; "memory" after these has the host's memory sampled as well.
    """

    def __init__(self) -> None:
        self.checkpoint, self.device = Path(sys.argv[1]), sys.argv[2]
        self._began = self._last = float(sys.argv[3])
        self._seconds: dict[str, float] = {}
        self._memory = MemoryWatch() if sys.argv[4:] == ["memory"] else None
        self.end("python")

    def prompt(self) -> list[int]:
        """Ids, the same for all, text in a vocabulary of any size."""
        return [(97 * i) % 251 for i in range(PROMPT_TOKENS)]

    def end(self, stage: str) -> None:
        """Call at the end of a stage: the next one begins."""
        now = time.monotonic()
        self._seconds[stage], self._last = now - self._last, now
        if self._memory:
            self._memory.mark(stage)

    def report(self, token: int) -> None:
        """Print all of it as JSON. `token` is what the process was started for."""
        figures = {"token": token, "seconds": self._last - self._began, "stages": self._seconds}
        if self._memory:
            figures["mebibytes"] = self._memory.stop()
        print(json.dumps(figures))


class MemoryWatch(threading.Thread):
    """The process's resident memory, sampled every few milliseconds.

    RssAnon is what the process itself holds; RssFile, pages of mapped files, the system can drop.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peaks: dict[str, float] = {}
        self._marks: dict[str, dict[str, float]] = {}
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self._sample()

    def mark(self, stage: str) -> None:
        """Note the peaks up to now."""
        self._sample()
        self._marks[stage] = dict(self._peaks)

    def stop(self) -> dict[str, dict[str, float]]:
        """Peaks in MiB since the start, up to the end of each stage."""
        self._done.set()
        return self._marks

    def _sample(self) -> None:
        for field, mebibytes in resident_memory().items():
            self._peaks[field] = max(self._peaks.get(field, 0.0), mebibytes)


def resident_memory() -> dict[str, float]:
    """MiB by field of /proc/self/status, as far as this system has them."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) / 1024 for name in FIELDS if name in fields}
