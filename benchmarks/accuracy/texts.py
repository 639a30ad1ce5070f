"""What attention methods do to long answers about long documents: how repetitive, how far from dense.

    python -m benchmarks.accuracy.texts FILE... --json OUT

SmolLM2 summarises pieces of text files, greedily, prompts of one length together. Nothing is right or wrong
here: of each setting's answers a row says how repetitive they are, how many tokens a pass fixes, and where
they leave dense attention's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import losart
from benchmarks.accuracy.grid import DENSE, GRIDS, Setting, label, paper, static, vary
from benchmarks.support.environment import command, commit
from benchmarks.support.markdown_table import markdown_table
from losart.cli.arguments import listed, positive
from losart.errors import DataError, LosartError
from losart.eval.figures import mean
from losart.eval.repetition import distinct, repeated_within
from losart.measure.environment import environment

GRID = GRIDS["english"]
ASKED = "Write a summary of this text."
BUDGETS = (64, 128, 256, 512)


def settings() -> list[Setting]:
    """Dense attention first, each way of remasking with all methods and budgets."""
    methods = [{"attention": "losa"}, paper(GRID.block), {"attention": "quest"}, {"attention": "sparsed"}]
    return [
        setting
        for remasking in ({}, static(2, GRID.block))
        for setting in [
            DENSE | remasking,
            *vary(methods, *(remasking | {"budget": budget} for budget in BUDGETS)),
        ]
    ]


def pieces(model: losart.Model, files: Sequence[Path], length: int, count: int) -> list[str]:
    """Parts of the files' texts, of so many tokens, as equally from each as they allow."""
    assert model.tokenizer is not None
    parts = []
    for number, file in enumerate(files):
        wanted = count // len(files) + (number < count % len(files))
        ids = model.tokenizer.encode_file(file, wanted * length)
        if len(ids) < wanted * length:
            raise DataError(f"{file}: has {len(ids)} tokens, not {wanted} times {length}")
        parts += [model.tokenizer.decode(ids[i * length : (i + 1) * length]) for i in range(wanted)]
    return parts


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens up to where two answers part."""
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)


def row(results: list[Any], dense: list[list[int]]) -> dict[str, Any]:
    """Figures of a setting's answers."""
    answers, stats = [list(one.token_ids) for one in results], [one.stats for one in results]
    passes = sum(one.denoising_passes for one in stats)
    tokens = sum(map(len, answers))
    return {
        "tokens": tokens / len(answers),
        "ended": sum(one.finish_reason == "stop" for one in results) / len(results),
        "tokens a pass": tokens / passes,
        "with commits": tokens / (passes + sum(one.commit_passes for one in stats)),
        "distinct 2-grams": distinct(answers),
        "repeated 4-grams": repeated_within(answers),
        "sparse read": mean(one.sparse_density for one in stats),
        "as dense": sum(map(list.__eq__, answers, dense)) / len(dense),
        "tokens as dense": sum(map(common, answers, dense)) / len(dense),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="texts in English")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--device", default="auto", help="(auto)")
    parser.add_argument(
        "--lengths", type=listed(int), default=(1000, 4000, 7500), metavar="LIST", help="of texts"
    )
    parser.add_argument("--samples", type=positive, default=64, metavar="N", help="texts of each length (64)")
    parser.add_argument("--new", type=positive, default=256, metavar="N", help="tokens at most (256)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        model = losart.load(GRID.model, args.device)
        facts = {"device": environment()["gpu" if model.device == "cuda" else "cpu"]["name"]}
        facts |= {"commit": commit(), "command": command(__file__), "samples": args.samples}
        for length in args.lengths:
            texts = pieces(model, args.files, length, args.samples)
            prompts = [[{"role": "user", "content": f"{text}\n\n{ASKED}"}] for text in texts]
            dense: list[list[int]] = []
            for setting in settings():
                results = model.generate(prompts, max_new_tokens=args.new, **setting)
                assert isinstance(results, list)
                if setting["attention"] == "dense":
                    dense = [list(one.token_ids) for one in results]
                rows.append({"length": length, "setting": label(setting, GRID.block)} | row(results, dense))
                print(rows[-1], flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n", "utf-8")
        print(markdown_table(rows))
    except (LosartError, OSError) as error:
        print(f"losart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
