"""Passes of two installed versions of losart, in turn.

    pip install --target BEFORE losart-old/ && pip install --target AFTER .
    python -m benchmarks.versions BEFORE AFTER --checkpoint DIR --device cuda

What is timed is what users have: `decode_seconds` over the passes of whole generations, after prompts that a
session has prefilled. Processes of one version differ by a few percent, so that versions take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

METHODS = {
    "dense": {},
    "losa": {"attention": "losa", "budget": 512},
    "sparsed": {"attention": "sparsed", "budget": 512},
}
PROBE = """
import json, statistics, sys
import losart
checkpoint, device, lengths, methods, repeats = json.loads(sys.argv[1])
model, found = losart.load(checkpoint, device), {}
for length in lengths:
    prompt = [(97 * i) % 251 for i in range(length)]
    for name, options in methods.items():
        options |= dict(block_length=16, remasking="low_confidence_static", stop_token_ids=[])
        session = model.session(max_new_tokens=64, **options)
        stats = [session.generate(prompt).stats for _ in range(repeats + 2)][2:]
        seconds = [each.decode_seconds / each.forward_passes for each in stats]
        found[f"{name} after {length}"] = 1e3 * statistics.median(seconds)
print(json.dumps(found))
"""


def main() -> None:
    """Measure, and print a row per method and prompt: milliseconds per pass, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="folder that the version to compare with is installed in")
    parser.add_argument("after")
    parser.add_argument("--checkpoint", metavar="DIR", help="the shipped one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    request = json.dumps([args.checkpoint, args.device, args.lengths, METHODS, 5])
    rounds: list[list[dict[str, float]]] = []
    for turn in range(args.rounds):
        folders = [args.before, args.after][:: 1 if turn % 2 else -1]
        by_folder = {folder: _probe(folder, request) for folder in folders}
        rounds.append([by_folder[args.before], by_folder[args.after]])
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
    print("| pass | before, ms | after, ms | ratio of medians | ratios by round |\n|---|---|---|---|---|")
    for name in rounds[0][0]:
        before, after = ([each[side][name] for each in rounds] for side in (0, 1))
        medians = statistics.median(before), statistics.median(after)
        ratios = sorted(b / a for a, b in zip(before, after, strict=True))
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {name} | {medians[0]:.3f} | {medians[1]:.3f} | {medians[1] / medians[0]:.3f} | {shown} |")


def _probe(folder: str, request: str) -> Any:
    command = [sys.executable, "-P", "-c", PROBE, request]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": folder}, check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
