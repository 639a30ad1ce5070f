"""Answers the prompts of Parquet or JSON lines files on Ray's workers, writes Parquet, and prints figures.

python examples/ray_batch.py prompts.jsonl answers --workers 2 --row-options max_new_tokens
python examples/ray_batch.py prompts answers --model path/to/SDAR-8B-Chat --device cuda --workers 8 --gpus 1

It runs on the cluster that RAY_ADDRESS names, else on one of this machine alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.compute
import pyarrow.dataset
import ray.data

from losart.ray import Generate


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    read = (
        ray.data.read_json if args.input.rstrip("/").endswith((".json", ".jsonl")) else ray.data.read_parquet
    )
    prompts = read(args.input).repartition(target_num_rows_per_block=args.batch_size)  # of a file, for all
    answers = prompts.map_batches(
        Generate,
        fn_constructor_kwargs={
            "model": args.model,
            "device": args.device,
            "max_sequences": args.max_sequences,
            "prompt": args.prompt,
            "chat": args.chat,
            "row_options": args.row_options,
            **args.options,
        },
        compute=ray.data.ActorPoolStrategy(
            size=args.workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
        batch_size=args.batch_size,
        batch_format="pyarrow",
    )
    began = time.perf_counter()
    answers.write_parquet(args.output, mode=ray.data.SaveMode.ERROR)
    print(figures(args.output, time.perf_counter() - began))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer the prompts of files on Ray's workers.")
    parser.add_argument(
        "input", metavar="IN", type=absolute, help="Parquet, or JSON lines if its name says so"
    )
    parser.add_argument("output", metavar="OUT", type=absolute, help="a new directory of Parquet")
    parser.add_argument("--model", help="as losart takes it (the small one that comes with losart)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--workers", type=int, default=2, help="models that are loaded (2)")
    parser.add_argument("--gpus", type=float, default=0, help="of a worker (0)")
    parser.add_argument("--cpus", type=float, default=0.5, help="of a worker; some are left to read (0.5)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows, twice --max-sequences (32)")
    parser.add_argument("--max-sequences", type=int, help="at a time (16, on a GPU 128)")
    parser.add_argument("--prompt", metavar="COLUMN", default="prompt", help="(prompt)")
    parser.add_argument("--chat", action="store_true", help="take text as a user's message")
    parser.add_argument("--row-options", nargs="*", default=[], metavar="COLUMN", help="options of a row")
    parser.add_argument(
        "--options", type=json.loads, default={}, metavar="JSON", help='{"max_new_tokens": 256}'
    )
    return parser.parse_args(arguments)


def absolute(path: str) -> str:
    """A path or a URI as workers know it."""
    return path if "://" in path else str(Path(path).absolute())


def figures(answers: str, seconds: float) -> str:
    """What was written, in a few lines."""
    names = ["prompt_tokens", "reused_tokens", "new_tokens", "mean_sequences", "error"]
    table = pyarrow.dataset.dataset(answers).to_table(names)
    failed = pyarrow.compute.not_equal(table["error"], "")
    of: dict[str, Any] = {name: pyarrow.compute.sum(table[name]).as_py() or 0 for name in names[:4]}
    new, answered = of["new_tokens"], table.num_rows - (errors := sum(failed.to_pylist()))
    return "\n".join(
        [
            f"rows               {table.num_rows}: {errors} with an error",
            f"prompt tokens      {of['prompt_tokens']}: {of['reused_tokens']} reused",
            f"new tokens         {new} in {seconds:.1f} s, workers' start included",
            f"tokens per second  {new / seconds:.1f}",
            f"sequences per pass {of['mean_sequences'] / max(1, answered):.1f}",
        ]
    )


if __name__ == "__main__":
    main()
