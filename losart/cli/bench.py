"""`losart bench`: how fast a model runs here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from losart.api.model import Model
from losart.attention import POLICIES
from losart.cli.arguments import add_loading, add_model_or_size, listed, positive
from losart.cli.progress import Steps, load_model, write_weights
from losart.cli.tables import formats, share, size
from losart.config.options import AttentionConfig
from losart.errors import OptionError
from losart.measure.bench import NoiseBlocks, check_prefix
from losart.measure.environment import environment

HELP = "measure prefill and denoising passes on the device at hand"
DESCRIPTION = """Measure how fast a prompt is prefilled, and how long the first and later passes over a
block take after prefixes of several lengths, for each attention method. On the CPU keys and values are
white noise, for sparse methods the worst case: the density says what they read. Lists are separated by
commas."""
EXAMPLE = "example: losart bench path/to/SDAR-1.7B-Chat --lengths 4096,16384 --attention dense,losa"
LENGTHS = (1024, 4096)
RANDOM_BLOCK = 16  # block length of the random weights


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_or_size(command)
    add_loading(command)
    command.add_argument(
        "--lengths",
        type=listed(int),
        metavar="LIST",
        help="tokens of the prefix (those of 1024,4096 that the model has)",
    )
    command.add_argument("--attention", type=listed(str), metavar="LIST", help="(all that the device has)")
    command.add_argument(
        "--budget", type=positive, default=256, metavar="N", help="positions that a query selects (256)"
    )
    command.add_argument("--block-length", type=positive, metavar="N", help="(the checkpoint's, else 16)")
    command.add_argument("--repeats", type=positive, default=3, metavar="N", help="blocks of each (3)")
    command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    with ExitStack() as stack:
        name = args.model
        if name is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="losart-bench-"))
            blocks = {"block_length": RANDOM_BLOCK} if args.family == "sdar" else {}
            name = write_weights(Path(folder), args.family, args.size, **blocks)
        model = load_model(
            name, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
        )
        figures = _measure(model, Path(name).name, args)
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)


def _measure(model: Model, name: str, args: argparse.Namespace) -> dict[str, Any]:
    block_length = args.block_length or model.config.block_length or RANDOM_BLOCK
    lengths = args.lengths or [n for n in LENGTHS if n <= model.config.max_positions - block_length]
    if not lengths:
        raise OptionError(f"lengths must be given: the model has no room for {LENGTHS[0]} and a block")
    for length in lengths:
        check_prefix(model.config, length, block_length)
    methods = args.attention or list(POLICIES)
    for method in methods:  # rejects wrong options
        model.session(attention=method, budget=args.budget, block_length=block_length)
    rows = []
    with Steps(len(lengths) * (1 + len(methods))) as steps:
        for length in lengths:
            steps.begin(f"filling a prefix of {length}")
            blocks = NoiseBlocks(model, length, block_length)
            passes = {}
            for method in methods:
                steps.begin(f"{method} after {length}")
                times = blocks.pass_times(AttentionConfig(method, args.budget), args.repeats)
                passes[method] = dataclasses.asdict(times)
            rows.append(
                {
                    "prefix": length,
                    "kv_bytes": blocks.cache.nbytes,
                    "prefill_tokens_per_second": blocks.prefill_rate,
                    "passes": passes,
                }
            )
    machine = environment()
    return {
        "losart": machine["losart"],
        "cpu": machine["cpu"]["name"],
        "threads": machine["cpu"]["threads"],
        "gpu": machine["gpu"]["name"] if model.device == "cuda" else None,
        "model": name,
        "adapter": args.adapter,
        "device": model.device,
        "dtype": model.dtype,
        "matrix_bytes": model.matrix_bytes,
        "kv": model.kv,
        "activations": model.activations,
        "block_length": block_length,
        "budget": args.budget,
        "lengths": rows,
    }


def _print(figures: dict[str, Any]) -> None:
    machine = figures["gpu"] or f"{figures['cpu']}, {figures['threads']} threads"
    held = f"{formats(figures['matrix_bytes'])}, keys and values in {figures['kv']},"
    print(f"{figures['model']} in {held} on {machine}, losart {figures['losart']}")
    print(f"blocks of {figures['block_length']}, budget {figures['budget']}; milliseconds per pass\n")
    print(f"{'prefix':>8}  {'KV':>10}  {'prefill':>10}  {'attention':9}  {'first':>8}  {'later':>8}  density")
    for row in figures["lengths"]:
        prefix = (
            f"{row['prefix']:8}  {size(row['kv_bytes']):>10}  {row['prefill_tokens_per_second']:6.0f} t/s"
        )
        for method, times in row["passes"].items():
            first, later = (f"{1e3 * times[f'{kind}_seconds']:8.1f}" for kind in ("first", "later"))
            print(f"{prefix}  {method:9}  {first}  {later}  {share(times['density']):>7}")
            prefix = " " * len(prefix)
