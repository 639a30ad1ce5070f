"""Prompts that are decoded together on the CPU, against one after another.

    OMP_NUM_THREADS=2 python -m benchmarks.cpu.batches --json FILE

Random weights of Qwen3-0.6B's sizes, prompts of random tokens, greedy, blocks of 4 of which each pass fixes
one token. Both ways take turns; the time is that of decoding, of the passes over blocks, prefill apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import losart
from benchmarks.support.environment import command, commit
from losart.backends.cpu.pool import threads_in_use
from losart.cli.progress import write_weights
from losart.measure.environment import cpu_name

SIZE = "0.6B"
BLOCK = 4


def measure(model: losart.Model, sequences: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Medians of seconds, and their ratio."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(model.config.vocab_size, size=prompt).tolist() for _ in range(sequences)]
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "block_length": BLOCK,
        "remasking": "low_confidence_static",
        "stop_token_ids": [],
    }
    model.generate(prompts[0], **options | {"max_new_tokens": BLOCK})
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(rounds):
        alone = [model.stream(one, **options).result() for one in prompts]
        seconds["alone"].append(sum(result.stats.decode_seconds for result in alone))
        engine = losart.Engine(model, max_sequences=sequences, prefill_first=True)
        streams = [engine.submit(one, **options) for one in prompts]
        together = [stream.result() for stream in streams]
        seconds["together"].append(engine.stats.decode_seconds)
    medians = {name: statistics.median(of_name) for name, of_name in seconds.items()}
    same = sum(a.token_ids == b.token_ids for a, b in zip(alone, together, strict=True))
    return {
        "sequences": sequences,
        "prompt": prompt,
        "new tokens": new,
        **{f"{name} s": value for name, value in medians.items()},
        **{f"{name} tokens/s": sequences * new / value for name, value in medians.items()},
        "alone/together": medians["alone"] / medians["together"],
        "equal answers": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--checkpoint", type=Path, help=f"a {SIZE} checkpoint (default: a random one is made)"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[2, 8, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or write_weights(Path(folder), "sdar", SIZE, block_length=BLOCK)
        rows: list[dict[str, Any]] = []
        figures = {
            "device": cpu_name(),
            "threads": threads_in_use(),
            "commit": commit(),
            "command": command(__file__),
            "rows": rows,
        }
        for dtype in args.dtypes:
            model = losart.load(checkpoint, "cpu", dtype)
            for sequences in args.sequences:
                row = {"dtype": dtype, **measure(model, sequences, args.prompt, args.new, args.rounds)}
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                if args.json:
                    args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
