"""Denoising passes on the CPU while other programs keep cores busy, beside passes that have them all.

    OMP_NUM_THREADS=2 python -m benchmarks.cpu.busy --busy 1 --json FILE

Random weights of Qwen3-0.6B's sizes, dense attention after a prefix of noise. Rounds without and with busy
processes take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import losart
from benchmarks.support.environment import command, commit
from benchmarks.support.markdown_table import markdown_table
from losart.backends.cpu.pool import threads_in_use
from losart.cli.arguments import listed
from losart.cli.progress import write_weights
from losart.config.options import AttentionConfig
from losart.engine.batch import PassKind
from losart.measure.bench import NoiseBlocks
from losart.measure.environment import cpu_name

SIZE = "0.6B"
PASSES = (16, 512), (4, 512), (16, 4096)  # tokens, prefix
SETTLING = 0.3  # seconds, until the scheduler has spread what runs


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never wait."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(SETTLING)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Of runs after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def measure(model: losart.Model, tokens: int, prefix: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of a pass, in milliseconds."""
    passes = NoiseBlocks(model, prefix, tokens).passes(AttentionConfig())
    passes.run(PassKind.FIRST)
    times: dict[int, list[float]] = {0: [], args.busy: []}
    for _ in range(args.rounds):
        for processes, found in times.items():
            with busy(processes):
                found += seconds(lambda: passes.run(PassKind.LATER), args.repeats)
    idle, beside = (1e3 * statistics.median(found) for found in times.values())
    return {"pass": f"{tokens}@{prefix}", "idle ms": idle, "busy ms": beside, "busy / idle": beside / idle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core busy (1)")
    parser.add_argument("--weights", type=listed(str), default=("bfloat16", "int8", "int4"))
    parser.add_argument("--repeats", type=int, default=4, help="counted passes of a round (4)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--checkpoint", type=Path, help=f"of {SIZE} (default: a random one is made)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or write_weights(Path(folder), "sdar", SIZE, block_length=16)
        for weights in args.weights:
            options = {} if weights == "bfloat16" else {"weights": weights}
            model = losart.load(checkpoint, "cpu", **options)
            rows += [{"weights": weights, **measure(model, *sizes, args)} for sizes in PASSES]
    machine = {"device": cpu_name(), "threads": threads_in_use(), "commit": commit(), "busy": args.busy}
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print(markdown_table(rows))
    if args.json:
        figures = {**machine, "command": command(__file__), "rows": rows}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
