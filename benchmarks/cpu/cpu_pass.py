"""One denoising pass on the CPU: losart dense and LoSA, beside transformers.

    OMP_NUM_THREADS=2 python -m benchmarks.cpu.cpu_pass

Random weights of Qwen3-0.6B's sizes, float32, block 16, greedy. The prefix is white noise in place
of keys and values (losart.measure.bench): dense attention's time does not depend on it, and for LoSA
it is the worst case, since every query then prefers other pages; the density beside each time says
how much was read. Without torch and transformers their row is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import losart
from benchmarks.support.environment import command, commit
from benchmarks.support.queries import LISTENING, queries_of
from benchmarks.support.transformers_pass import TransformersPass
from losart.backends.cpu.pool import threads_in_use
from losart.cli.progress import Steps, write_weights
from losart.config.options import AttentionConfig
from losart.engine.batch import PassKind
from losart.measure.bench import BlockPasses, NoiseBlocks
from losart.measure.environment import cpu_name

SIZE = "0.6B"
BLOCK = 16
LOSA = AttentionConfig(method="losa", budget=512, active=5)
SHORT_PREFIX = 4096
LONG_PREFIX = 16384


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of several runs after one that does not count."""
    run()
    return statistics.median(timeit.repeat(run, number=1, repeat=repeats))


def blocks_after(checkpoint: Path, prefix: int) -> NoiseBlocks:
    """Blocks of a losart model after a prefix of noise."""
    return NoiseBlocks(losart.load(checkpoint, device="cpu", dtype="float32"), prefix, BLOCK)


def later_passes(ours: NoiseBlocks, attention: AttentionConfig) -> BlockPasses:
    """Passes over a block whose first one is done."""
    passes = ours.passes(attention)
    passes.run(PassKind.FIRST)
    return passes


def prefix_attention(ours: NoiseBlocks, passes: BlockPasses) -> Callable[[], None]:
    """Only the prefix attention of all layers, on the queries of two alternating passes."""
    queries = [queries_of(ours.transformer, ours.passes(LISTENING)) for _ in range(2)]
    batch = passes.batch(PassKind.LATER)
    policy = ours.transformer.policy(batch.options)

    def run() -> None:
        queries.reverse()
        for layer, q in enumerate(queries[0]):
            policy.prefix(ours.transformer.backend, layer, q, batch)

    return run


def beside_transformers(checkpoint: Path, prefix: int, repeats: int) -> dict[str, float]:
    """A dense pass of both, in milliseconds, and their ratio."""
    ours = blocks_after(checkpoint, prefix)
    passes = later_passes(ours, AttentionConfig())
    runs: dict[str, Callable[[], object]] = {"losart": lambda: passes.run(PassKind.LATER)}
    with suppress(ImportError):
        import torch

        torch.set_num_threads(threads_in_use())
        runs["transformers"] = TransformersPass(SIZE, "cpu", "float32").after(prefix, BLOCK)
    # In turns, so that a machine that slows down slows both; each settles before the other begins.
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in list(runs.items()) * 3:
        time.sleep(0.2)
        times[name].append(median_seconds(run, repeats))
    row = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    if "transformers" in row:
        row["transformers / losart"] = row["transformers"] / row["losart"]
    return row


def losa_beside_dense(checkpoint: Path, prefix: int, repeats: int) -> dict[str, Any]:
    """Prefix attention alone and the whole pass, in milliseconds, with ratios and density."""
    ours = blocks_after(checkpoint, prefix)
    methods = {"dense": later_passes(ours, AttentionConfig()), "losa": later_passes(ours, LOSA)}
    figures: dict[str, Any] = {}
    for title, prepare in (
        (f"prefix attention at {prefix}", lambda passes: prefix_attention(ours, passes)),
        (f"whole pass at {prefix}", lambda passes: lambda: passes.run(PassKind.LATER)),
    ):
        row = {name: 1e3 * median_seconds(prepare(passes), repeats) for name, passes in methods.items()}
        row["dense / losa"] = row["dense"] / row["losa"]
        figures[title] = row
    figures["density of losa's sparse passes"] = methods["losa"].reads.sparse_density
    return figures


def measure(checkpoint: Path, repeats: int) -> dict[str, Any]:
    """All figures."""
    with Steps(2) as steps:
        steps.begin("losart beside transformers")
        short = beside_transformers(checkpoint, SHORT_PREFIX, repeats)
        steps.begin("LoSA beside dense attention")
        long = losa_beside_dense(checkpoint, LONG_PREFIX, repeats)
    return {
        "threads": threads_in_use(),
        "cpu": cpu_name(),
        "losart": f"{losart.__version__}, commit {commit()}",
        "command": command(__file__),
        f"dense pass at {SHORT_PREFIX}": short,
        **long,
    }


def print_table(figures: dict[str, Any]) -> None:
    """Medians in milliseconds, and ratios."""
    for title, value in figures.items():
        if not isinstance(value, dict):
            print(f"{title}: {value}")
            continue
        cells = [f"{name} {x:.2f}x" if "/" in name else f"{name} {x:.1f} ms" for name, x in value.items()]
        print(f"{title}: {', '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each (7)")
    parser.add_argument("--checkpoint", type=Path, help="a 0.6B checkpoint (default: a random one is made)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or write_weights(
            Path(folder), "sdar", SIZE, dtype="float32", block_length=BLOCK
        )
        figures = measure(checkpoint, args.repeats)
    print_table(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
