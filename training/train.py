"""Trains the checkpoint that comes with losart: `python training/train.py OUT`.

Resumes from OUT/training.pt where there is one; else it begins with random weights, or with those of
`--start`. Rows and masks follow from the seed and the step, the learning rate from the share of `--minutes`
that is over.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import recall_rows
from schedule import STAGES
from sdar_directory import write_checkpoint
from summary import write_summary
from trainer import Trainer

from losart.errors import LosartError
from losart.eval.vocabulary import write_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the checkpoint that comes with losart.")
    parser.add_argument(
        "directory", type=Path, help="gets training.pt, log.jsonl, the checkpoint and training.json"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole training (9)")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="MINUTES", help="stop this run after"
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="CHECKPOINT",
        help="directory of the weights to begin with instead of random ones; not read when resuming",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--page-bound",
        type=float,
        default=0.3,
        metavar="WEIGHT",
        help="of the loss that makes pages easy to select; 0 for none (0.3)",
    )
    args = parser.parse_args()
    trainer = Trainer(
        args.directory, STAGES, args.minutes, args.seed, device=args.device, page_bound=args.page_bound
    )
    try:
        if trainer.resume():
            print(f"going on from step {trainer.state.step}")
        elif args.start is not None:
            trainer.start(args.start)
            print(f"beginning with the weights of {args.start}")
    except LosartError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    over = trainer.run(60 * args.limit)
    write_checkpoint(trainer.model, args.directory / "checkpoint", recall_rows.SPECIAL, recall_rows.BLOCK)
    write_tokenizer(args.directory / "checkpoint")
    write_summary(trainer, args.directory / "training.json")
    print("training is over" if over else "run again to go on", flush=True)


if __name__ == "__main__":
    main()
