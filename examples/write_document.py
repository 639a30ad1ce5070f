"""Writes a document of symbols whose last line is a question; its answer goes to standard error.

python examples/write_document.py --task chain-2 --tokens 4096 --seed 6 > examples/document.txt
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from losart.errors import OptionError
from losart.eval import TASKS
from losart.eval.symbol_text import answer_text, prompt_text
from losart.eval.symbols import make_batch


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a document of symbols with a question about it.")
    parser.add_argument("--task", choices=TASKS, default="chain-2", help="what is asked (chain-2)")
    parser.add_argument("--tokens", type=int, default=4096, help="of document and question (4096)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        rng = np.random.default_rng(args.seed)
        batch = make_batch(rng, 1, args.tokens, {args.task: 1.0}, split="eval")
    except (OptionError, ValueError) as error:
        parser.error(str(error))
    print(prompt_text(batch.documents[0], batch.questions[0, 0]), end="")
    print(answer_text(batch.answers[0, 0]), file=sys.stderr)


if __name__ == "__main__":
    main()
