"""Write a checkpoint with random weights.

python -m benchmarks.support.random_checkpoint DIRECTORY --size 1.7B --dtype bfloat16 --seed 0
"""

from __future__ import annotations

import argparse

from losart.cli.progress import Progress
from losart.config.precision import DTYPES
from losart.measure.random_checkpoint import FAMILY_SIZES, write_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--family", choices=FAMILY_SIZES, default="sdar")
    parser.add_argument("--size", default="tiny", help="of the family, as losart bench --help lists them")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, for tiny float32")
    parser.add_argument("--block-length", type=int, help="the family's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with Progress(f"writing random weights of {arguments.size}", "MiB") as progress:
        given = {name: value for name, value in vars(arguments).items() if value is not None}
        write_size(**given, progress=progress)


if __name__ == "__main__":
    main()
