"""A layer's mixture of experts on the CPU: time per byte of used experts, beside a dense feed-forward.

python -m benchmarks.cpu.experts [--tokens 4,16,32] [--repeats 7]

Released sizes, bfloat16, random weights mapped from files, as a checkpoint's are, so random routing:
SDAR-30B-A3B (128 experts of width 768) and LLaDA2.0-mini (256 of width 512, and a shared one), beside a
feed-forward of width 6,144; hidden 2,048. Layers take turns, so that weights are not in the CPU's cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.support.environment import commit
from benchmarks.support.markdown_table import markdown_table
from losart.backends.base import ExpertWeights
from losart.backends.cpu.backend import CpuBackend, Weight
from losart.backends.cpu.pool import threads_in_use
from losart.backends.cpu.routing import route
from losart.cli.arguments import listed
from losart.config.model import ExpertsConfig, ModelConfig
from losart.config.precision import Precision
from losart.engine.batch import PassKind
from losart.measure.environment import cpu_name

HIDDEN, FFN, LAYERS = 2048, 6144, 2
BFLOAT16 = Precision.of("bfloat16")
PASS: Any = SimpleNamespace(kind=PassKind.LATER)  # all that experts need to know of a pass
MIXTURES = {
    "SDAR-30B-A3B": ExpertsConfig(128, per_token=8, intermediate_size=768),
    "LLaDA2.0-mini": ExpertsConfig(
        256, 8, 512, scores="sigmoid", groups=8, kept_groups=4, scaling=2.5, shared=1
    ),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a layer, the bytes that it read, and the experts that it used."""

    seconds: float
    nbytes: float
    used: float


def noise(rows: int, inner: int) -> Weight:
    """A matrix of values of about 1 / sqrt(inner), whose bits are random."""
    bits = np.random.default_rng(rows).integers(0, 1 << 16, rows * inner, np.uint16)
    exponent = 127 - int(np.log2(inner)) // 2
    values = (bits & 0x807F) | np.uint16(exponent << 7)
    with tempfile.TemporaryFile() as file:
        values.tofile(file)
        file.flush()
        mapped = np.memmap(file, np.uint16, "r", shape=(rows, inner))
    mapped[:, 0].max()  # its pages come into memory
    return Weight((mapped,), BFLOAT16.weights)


def median(run: Callable[[int], Any], repeats: int) -> float:
    """Of the seconds that it takes, after one run that does not count."""
    seconds = []
    for turn in range(repeats + 1):
        began = time.perf_counter()
        run(turn % LAYERS)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def dense(backend: CpuBackend, x: np.ndarray, repeats: int) -> Timing:
    """A feed-forward."""
    layers = [(noise(2 * FFN, HIDDEN), noise(HIDDEN, FFN)) for _ in range(LAYERS)]

    def run(layer: int) -> None:
        gate_up, down = layers[layer]
        backend.linear(backend.gated_linear(x, gate_up, False), down)

    return Timing(median(run, repeats), 2 * 3 * FFN * HIDDEN, 1)


def mixture(backend: CpuBackend, config: ExpertsConfig, x: np.ndarray, repeats: int) -> Timing:
    """A mixture of experts."""
    count, width = config.count + config.shared, config.intermediate_size
    layers = []
    for _ in range(LAYERS):
        stacks = (
            tuple(noise(rows, inner) for _ in range(count))
            for rows, inner in ((2 * width, HIDDEN), (HIDDEN, width))
        )
        layers.append(ExpertWeights(config, noise(config.count, HIDDEN), None, *stacks))
    turns, used = [], []
    for turn in range(repeats + 1):  # each with other experts
        rows = np.random.default_rng(turn).permuted(x, axis=1)
        chosen, _ = route(backend.linear(rows, layers[turn % LAYERS].router), None, config)
        turns.append(rows)
        used.append(len(np.unique(chosen)) + config.shared)
    left = iter(turns)
    seconds = median(lambda layer: backend.experts(next(left), layers[layer], PASS), repeats)
    experts = float(np.median(used[1:]))
    return Timing(seconds, 2 * 3 * width * HIDDEN * experts, experts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=listed(int), default=(4, 16, 32))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "intermediate_size": FFN,
        "num_heads": 16,
        "num_kv_heads": 4,
        "head_dim": 128,
    }
    config = ModelConfig("sdar_moe", hidden_size=HIDDEN, num_layers=1, max_positions=64, **sizes)
    backend, rows = CpuBackend(config, BFLOAT16), []
    for tokens in args.tokens:
        x = np.random.default_rng(0).standard_normal((tokens, HIDDEN), np.float32)
        beside = dense(backend, x, args.repeats)
        rows.append(row(tokens, "feed-forward", beside, beside))
        for name, experts in MIXTURES.items():
            rows.append(row(tokens, name, mixture(backend, experts, x, args.repeats), beside))
    print(f"{cpu_name()}, {threads_in_use()} threads, commit {commit()}\n")
    print(markdown_table(rows))


def row(tokens: int, layer: str, timing: Timing, beside: Timing) -> dict[str, Any]:
    """A line of the table."""
    per_byte = timing.seconds / timing.nbytes
    return {
        "tokens": tokens,
        "layer": layer,
        "used": f"{timing.used:.0f}",
        "MB": f"{timing.nbytes / 1e6:.0f}",
        "ms": f"{timing.seconds * 1e3:.1f}",
        "GB/s": f"{1e-9 / per_byte:.1f}",
        "per byte": f"{per_byte * beside.nbytes / beside.seconds:.2f}x",
    }


if __name__ == "__main__":
    main()
