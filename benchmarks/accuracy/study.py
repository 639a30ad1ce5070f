"""What attention methods cost in accuracy: a checkpoint of ours, over a grid of `grid.py`.

    python -m benchmarks.accuracy.study --json FILE --jobs 8
    python -m benchmarks.accuracy.study --grid english --json FILE --jobs 8

The file is rewritten after each cell; the same command resumes where it was cut short.
`report.py` makes tables and pictures of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import losart
from benchmarks.accuracy.grid import GRIDS, Asked, Setting, cell_key, cells, label
from benchmarks.support.environment import command, commit
from losart.cli.arguments import listed, positive
from losart.cli.eval_report import JsonReport
from losart.cli.progress import Progress
from losart.errors import DataError, LosartError, OptionError
from losart.eval import TASKS, Cell, EvalConfig
from losart.eval.evaluation import measure
from losart.measure.environment import environment

TOGETHER = 12  # settings that share a KV cache: a document is prefilled once for all of them


@dataclass(frozen=True)
class StudyCell(Cell):
    """A cell with all options of its generations, and the commit that it was measured at."""

    setting: Setting
    commit: str


@cache
def model_of(grid: str, device: str) -> losart.Model:
    """The checkpoint, loaded once in each process."""
    return losart.load(GRIDS[grid].model, device)


def device_facts(grid: str, device: str) -> dict[str, str]:
    """What a process measures on."""
    model = model_of(grid, device)
    machine = environment()["gpu" if model.device == "cuda" else "cpu"]
    return {"device": model.device, "device_name": machine["name"], "dtype": model.dtype}


def jobs(wanted: Sequence[Asked]) -> Iterator[tuple[Asked, ...]]:
    """Cells of one task and length whose generations can share a session, in the order in which they come."""

    def session(asked: Asked) -> tuple[str, int, int | None]:
        return asked.task, asked.length, asked.setting.get("block_length")

    groups: dict[Any, list[Asked]] = {}
    for asked in wanted:
        groups.setdefault(session(asked), []).append(asked)
    for group in groups.values():
        left = iter(group)
        while job := tuple(itertools.islice(left, TOGETHER)):
            yield job


def ask(job: Sequence[Asked], grid: str, device: str, samples: int, seed: int) -> list[Cell]:
    """Ask the questions of some cells of one task and length."""
    task, length = job[0].task, job[0].length
    config = EvalConfig((task,), (length,), samples=samples, seed=seed)
    settings = [asked.setting for asked in job]
    return measure(model_of(grid, device), task, length, settings, config, GRIDS[grid].style)


class Study:
    """A file of cells, and processes that measure those that it lacks.

    Parameters
    ----------
    file : Path
        An existing one must be of the same study: grid, device, questions and seed.
    grid : str
        Key of `GRIDS`.
    device : str
    jobs : int
        Processes.
    samples, seed : int
        As in `EvalConfig`.
    """

    def __init__(self, file: Path, grid: str, device: str, jobs: int, samples: int, seed: int) -> None:
        self._file, self._jobs = file, jobs
        self._options: dict[str, Any] = {"grid": grid, "device": device, "samples": samples, "seed": seed}

    def run(self, wanted: Sequence[Asked]) -> None:
        """Measure the cells, in their order, with progress.

        Raises
        ------
        DataError
            The file is of another study.
        LosartError
            The device does not work, or a process ended.
        """
        spawn = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
        pool = ProcessPoolExecutor(self._jobs, spawn, _end_quietly)
        try:
            grid = self._options["grid"]
            facts = pool.submit(device_facts, grid, self._options["device"]).result()
            facts |= {name: self._options[name] for name in ("grid", "samples", "seed")}
            facts |= {"command": command(__file__)}
            done = read_study(self._file, facts)
            report = JsonReport(str(self._file), facts, done=done)
            known = {cell_key(cell.task, cell.length, cell.setting) for cell in done}
            left = [asked for asked in wanted if asked.key not in known]
            questions = len(left) * self._options["samples"]
            print(f"{len(wanted)} cells, {len(left)} of them to measure: {questions:,} questions", flush=True)
            with Progress("measuring", "cells") as progress:
                for count, cell in enumerate(self._measured(pool, left), 1):
                    report.add(cell)
                    progress.clear()
                    print(line(cell, GRIDS[grid].block), flush=True)
                    progress(count, len(left))
        except BrokenProcessPool as error:
            raise LosartError("a process of the study ended; the same command resumes it") from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _measured(self, pool: ProcessPoolExecutor, left: Sequence[Asked]) -> Iterator[StudyCell]:
        """Cells as they come."""
        at = commit()
        futures = {pool.submit(ask, job, **self._options): job for job in jobs(left)}
        for future in as_completed(futures):
            for asked, cell in zip(futures[future], future.result(), strict=True):
                yield StudyCell(**asdict(cell), setting=asked.setting, commit=at)


def read_study(file: Path, facts: dict[str, Any]) -> list[StudyCell]:
    """The cells of a study's file; none where it does not exist.

    Raises
    ------
    DataError
        It is something else, or of other facts than these; the command may be another.
    """
    if not file.exists():
        return []
    try:
        report = json.loads(file.read_text("utf-8"))
        done = [StudyCell(**cell) for cell in report["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no file of this study") from error
    report = {"grid": "symbols"} | report  # which files did not say when there was one
    for name in facts.keys() - {"command"}:
        if report.get(name) != facts[name]:
            raise DataError(
                f"{file} has {name} {report.get(name)!r}, not {facts[name]!r}: give another --json"
            )
    return done


def line(cell: StudyCell, block: int) -> str:
    """A cell in one line; `block` as of `label`."""
    interval = f"{cell.accuracy:.1%} ({cell.low:.1%} - {cell.high:.1%})"
    return f"{cell.length} {cell.task}, {label(cell.setting, block)}: {interval}"


def _end_quietly() -> None:
    """An interrupt silently ends a process of the pool: the one that started it prints the message."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the study's file")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes, on one device (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--samples", type=positive, default=400, metavar="N", help="questions per cell (400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument("--grid", choices=GRIDS, default="symbols", help="(symbols)")
    groups = GRIDS["symbols"].groups  # every grid has these
    parser.add_argument("--groups", nargs="+", choices=groups, default=(), metavar="NAME", help="only these")
    parser.add_argument("--lengths", type=listed(int), default=(), metavar="LIST", help="(the grid's)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=(), metavar="NAME", help="only these")
    args = parser.parse_args()
    try:
        wanted = cells(GRIDS[args.grid], args.groups, args.lengths, args.tasks)
        Study(args.json, args.grid, args.device, args.jobs, args.samples, args.seed).run(wanted)
    except KeyboardInterrupt:
        print("\nlosart: interrupted; the same command resumes it", file=sys.stderr)
        return 130
    except (LosartError, OSError) as error:
        print(f"losart: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
