"""Write a checkpoint in SDAR's format with random weights.

python -m benchmarks.support.random_checkpoint DIRECTORY --size 1.7B --dtype bfloat16 --seed 0
"""

from __future__ import annotations

import argparse

from losart.cli.progress import Progress
from losart.config.precision import DTYPES
from losart.measure.random_checkpoint import SIZES, write_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, for tiny float32")
    parser.add_argument("--block-length", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with Progress(f"writing random weights of {arguments.size}", "MiB") as progress:
        write_size(**vars(arguments), progress=progress)


if __name__ == "__main__":
    main()
