"""`losart quantize`: a checkpoint with quantized weights, of one with 16 or 32 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from losart.cli.arguments import positive
from losart.cli.progress import Progress
from losart.cli.tables import size
from losart.loaders import open_checkpoint
from losart.quantization import WEIGHTS, WeightFormat, quantize_checkpoint

HELP = "write a checkpoint with quantized weights"
DESCRIPTION = """Write a checkpoint whose layers' matrices are rounded to 4 or 8 bits, in the format of
compressed-tensors, which transformers and vLLM load too. Embedding, norms and biases stay as they are."""
EXAMPLE = "example: losart quantize path/to/SDAR-8B-Chat SDAR-8B-int4 --weights int4 --group 64 --head int8"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    command.add_argument("source", metavar="SRC", help="checkpoint directory or hub id")
    command.add_argument("destination", metavar="DST", type=Path, help="a directory that does not exist yet")
    command.add_argument("--weights", choices=WEIGHTS, default="int4", help="of the layers' matrices (int4)")
    command.add_argument(
        "--group",
        type=positive,
        metavar="N",
        help="columns that share a scale (int4: 64, int8: all of a row)",
    )
    command.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="a text to keep errors small for, by GPTQ, which reads 16,384 tokens of it several times (round "
        "to nearest)",
    )
    command.add_argument("--head", choices=WEIGHTS, help="of the output projection (as it is)")


def run(args: argparse.Namespace) -> None:
    """Write it, and say how large it is."""
    weights = WeightFormat.by_default(args.weights, args.group)
    head = None if args.head is None else WeightFormat.by_default(args.head)
    checkpoint = open_checkpoint(args.source)
    with Progress("calibrating" if args.calibrate else "rounding weights", "MiB") as progress:
        written = quantize_checkpoint(checkpoint, args.destination, weights, head, progress, args.calibrate)
    before, after = (
        sum(tensor.nbytes for tensor in of.tensors.values()) for of in (checkpoint, open_checkpoint(written))
    )
    print(f"{written}: {size(after)} of weights, before {size(before)}")
