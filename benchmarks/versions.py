"""Passes of two installed versions of losart, in turn.

    pip install --target BEFORE losart-old/ && pip install --target AFTER .
    python -m benchmarks.versions BEFORE AFTER --size 1.7B --lengths 8192,32000 --repeats 100

All further arguments are those of `losart bench`. Its times differ from process to process by a few percent:
the versions take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

COMMAND = [sys.executable, "-P", "-c", "from losart.cli import main; main()", "bench", "--json"]


def main() -> None:
    """Print a row per pass: milliseconds of both versions, their ratio, and that of each round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs=2, help="that the versions are installed in")
    parser.add_argument("--rounds", type=int, default=5)
    args, arguments = parser.parse_known_args()
    times: dict[str, dict[str, list[float]]] = {folder: {} for folder in args.folders}
    for turn in range(args.rounds):
        for folder in args.folders[:: -1 if turn % 2 else 1]:
            environment = os.environ | {"PYTHONPATH": folder}
            done = subprocess.run([*COMMAND, *arguments], env=environment, check=True, stdout=subprocess.PIPE)
            for row in json.loads(done.stdout)["lengths"]:
                for method, passes in row["passes"].items():
                    for kind in ("first", "later"):
                        name = f"{method} after {row['prefix']}, {kind}"
                        times[folder].setdefault(name, []).append(1e3 * passes[f"{kind}_seconds"])
    print("| pass | before, ms | after, ms | ratio | by round |\n|---|---|---|---|---|")
    for (name, before), after in zip(*(folder.items() for folder in times.values()), strict=True):
        medians = statistics.median(before), statistics.median(after[1])
        ratios = " ".join(f"{b / a:.3f}" for a, b in zip(before, after[1], strict=True))
        print(f"| {name} | {medians[0]:.3f} | {medians[1]:.3f} | {medians[1] / medians[0]:.3f} | {ratios} |")


if __name__ == "__main__":
    main()
