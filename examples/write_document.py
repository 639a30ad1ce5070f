"""Writes a document whose last line is a question; its answer goes to standard error.

python examples/write_document.py --task chain-2 --tokens 4096 --seed 6 > examples/document.txt
python examples/write_document.py --english smollm2 --task keys-2 --tokens 4000 --seed 2 > english.txt
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from losart.errors import LosartError
from losart.eval import TASKS
from losart.eval.english import make_text
from losart.eval.symbol_text import answer_text, prompt_text
from losart.eval.symbols import make_batch
from losart.loaders import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a document with a question about it, of symbols.")
    parser.add_argument("--task", choices=TASKS, default="chain-2", help="what is asked (chain-2)")
    parser.add_argument("--tokens", type=int, default=4096, help="of document and question (4096)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--english", metavar="MODEL", help="in English, of so many of this checkpoint's tokens"
    )
    args = parser.parse_args()
    try:
        rng = np.random.default_rng(args.seed)
        if args.english is None:
            batch = make_batch(rng, 1, args.tokens, {args.task: 1.0}, split="eval")
            text = prompt_text(batch.documents[0], batch.questions[0, 0])
            answer = answer_text(batch.answers[0, 0])
        else:
            tokenizer = open_checkpoint(args.english).tokenizer
            if tokenizer is None:
                parser.error(f"{args.english} has no tokenizer")
            text, answer = make_text(rng, TASKS[args.task], args.tokens, lambda t: len(tokenizer.encode(t)))
            text += "\n"
    except (LosartError, ValueError) as error:
        parser.error(str(error))
    print(text, end="")
    print(answer, file=sys.stderr)


if __name__ == "__main__":
    main()
