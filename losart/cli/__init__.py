"""The command `losart`."""

from losart.cli.main import main

__all__ = ["main"]
