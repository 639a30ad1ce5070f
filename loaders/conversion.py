"""How a model that predicts the next token was made one that fills in blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from losart.config.model import ModelConfig
from losart.errors import ConfigError
from losart.loaders.families import FAMILIES
from losart.loaders.json_files import JsonObject, errors_naming, read_json_object

FILE = "losart.json"  # beside an adapter's files


@dataclass(frozen=True)
class Conversion:
    """Which family's decoding a model of an autoregressive architecture was trained for.

    Attributes
    ----------
    file : Path
        That says so.
    family : str
        As `FAMILIES` calls it.
    block_length : int
    mask_token_id : int
    """

    file: Path
    family: str
    block_length: int
    mask_token_id: int

    @classmethod
    def of(cls, file: Path, family: str, block_length: int, mask_token_id: int, key: str) -> Conversion:
        """Check the family, which the file has at `key`.

        Raises
        ------
        ConfigError
            There is no such family.
        """
        if family not in FAMILIES:
            raise ConfigError(f"{file}: {key} must be one of {', '.join(sorted(FAMILIES))}, not {family!r}")
        return cls(file, family, block_length, mask_token_id)

    def applied(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a base, with this decoding.

        Raises
        ------
        ConfigError
            The base has not so many positions, or no such token.
        """
        with errors_naming(self.file):
            return replace(
                config,
                model_type=self.family,
                decoding=FAMILIES[self.family].decoding,
                block_length=self.block_length,
                mask_token_id=self.mask_token_id,
            )


def read_conversion(directory: Path) -> Conversion | None:
    """What losart.json of an adapter's directory says; None where there is none.

    Raises
    ------
    CheckpointError, ConfigError
        The file is unreadable, or a key is missing or impossible.
    """
    file = directory / FILE
    if not file.exists():
        return None
    keys = read_json_object(file)
    for key in keys.values:
        if key not in ("family", "block_length", "mask_token_id"):
            raise ConfigError(f"{file}: {key} is not a key that losart knows")
    family = _required(keys, keys.optional_text("family"), "family")
    mask = _required(keys, keys.optional_integer("mask_token_id", 0), "mask_token_id")
    return Conversion.of(file, family, keys.integer("block_length"), mask, "family")


def _required(keys: JsonObject, value: Any, key: str) -> Any:
    if value is None:
        raise keys.missing(key)
    return value
