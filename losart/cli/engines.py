"""The engine of a command, and the arguments that say how it is made."""

from __future__ import annotations

import argparse
import re

from losart.api.engine import Engine
from losart.api.model import Model
from losart.cli.arguments import positive

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def add_engine(command: argparse.ArgumentParser) -> None:
    """How many prompts are answered together, in how much memory, and after what."""
    group = command.add_argument_group("engine")
    group.add_argument("--max-sequences", type=positive, metavar="N", help="at a time (16, on a GPU 128)")
    group.add_argument(
        "--kv-memory",
        type=memory,
        metavar="SIZE",
        help="for keys and values, such as 512M or 4G (what the device has)",
    )
    group.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="FILE",
        help="a beginning that `losart prefix save` wrote, which is not prefilled again; repeatable",
    )


def open_engine(model: Model, args: argparse.Namespace) -> Engine:
    """The engine, with the prefixes in it; nobody waits for one of its answers alone."""
    limits = {"max_sequences": args.max_sequences, "kv_memory": args.kv_memory}
    engine = Engine(model, **limits, prefill_first=True)
    for file in args.prefix:
        engine.load_prefix(file)
    return engine


def memory(text: str) -> int:
    """Bytes: a number, with K, M, G or T for powers of 1,024."""
    found = re.fullmatch(r"(\d+|\d*\.\d+)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 2 ** UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be bytes, such as 512M or 4G, not {text!r}")
    return size
