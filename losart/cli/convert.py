"""`losart convert`: a GGUF file, or a base with an adapter, as a directory that transformers loads too."""

from __future__ import annotations

import argparse
from pathlib import Path

from losart.cli.progress import Progress
from losart.cli.tables import size
from losart.config.precision import DTYPES
from losart.loaders import open_checkpoint
from losart.quantization import convert_checkpoint

HELP = "write a GGUF file, or a base with its adapter merged, as a directory"
DESCRIPTION = """Write a checkpoint as a directory of plain safetensors in the manner of transformers: of a
GGUF file, of a base and its adapter, merged, or of quantized weights, widened. It loads faster than those,
since it is mapped as it is. A file losart.json in it says which family's decoding it was trained for."""
EXAMPLE = "example: losart convert base.gguf merged --adapter path/to/adapter --dtype bfloat16"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    command.add_argument("source", metavar="SRC", help="checkpoint directory, hub id or GGUF file")
    command.add_argument("destination", metavar="DST", type=Path, help="a directory that does not exist yet")
    command.add_argument("--adapter", metavar="PATH", help="a LoRA as PEFT writes it, which is merged (none)")
    command.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="(the source's)")


def run(args: argparse.Namespace) -> None:
    """Write it, and say how large it is."""
    checkpoint = open_checkpoint(args.source, args.adapter)
    with Progress("writing", "MiB") as progress:
        written = convert_checkpoint(checkpoint, args.destination, args.dtype, progress)
    weights = sum(tensor.nbytes for tensor in open_checkpoint(written).tensors.values())
    print(f"{written}: {size(weights)} of weights")
