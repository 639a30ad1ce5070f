"""How a model that predicts the next token was made one that fills in blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig, generation_config
from losart.errors import ConfigError, OptionError
from losart.loaders.families import FAMILIES
from losart.loaders.json_files import JsonObject, errors_naming, read_json_object

# They have keys of their own, or are of attention.
_NO_DEFAULTS = {
    "block_length",
    "mask_token_id",
    "attention",
    *(field.name for field in fields(AttentionConfig)),
}
FILE = "losart.json"  # beside the files of an adapter, or of a checkpoint of an ordinary architecture


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
    options : tuple of (str, Any)
        Of a generation, by default, where they are not the family's.
    """

    file: Path
    family: str
    block_length: int
    mask_token_id: int
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        file: Path,
        family: str,
        block_length: int,
        mask_token_id: int,
        key: str,
        options: tuple[tuple[str, Any], ...] = (),
    ) -> Conversion:
        """Check the family, which the file has at `key`.

        Raises
        ------
        ConfigError
            There is no such family.
        """
        if family not in FAMILIES:
            raise ConfigError(f"{file}: {key} must be one of {', '.join(sorted(FAMILIES))}, not {family!r}")
        return cls(file, family, block_length, mask_token_id, options)

    def applied(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a base, with this decoding.

        Raises
        ------
        ConfigError
            The base has not so many positions, or no such token, or there is no such option.
        """
        decoding = FAMILIES[self.family].decoding
        own_names = dict(decoding.names)
        options = {own_names.get(name, name): value for name, value in self.options}
        for name in options:
            if name in _NO_DEFAULTS:
                raise ConfigError(f"{self.file}: options: {name} is none that is a checkpoint's by default")
        defaults = tuple((dict(decoding.defaults) | options).items())
        with errors_naming(self.file):
            converted = replace(
                config,
                model_type=self.family,
                decoding=replace(decoding, defaults=defaults),
                block_length=self.block_length,
                mask_token_id=self.mask_token_id,
            )
        try:
            generation_config(converted, options)
        except OptionError as error:
            raise ConfigError(f"{self.file}: options: {error}") from error
        return converted

    @classmethod
    def within(cls, config: ModelConfig, file: Path) -> Conversion:
        """What made this configuration of an ordinary one, to be written to `file`."""
        assert config.block_length is not None and config.mask_token_id is not None
        published = FAMILIES[config.model_type].decoding.defaults
        options = tuple(option for option in config.decoding.defaults if option not in published)
        return cls(file, config.model_type, config.block_length, config.mask_token_id, options)

    @property
    def json(self) -> dict[str, Any]:
        """As losart.json has it."""
        keys = {name: getattr(self, name) for name in ("family", "block_length", "mask_token_id")}
        return keys | ({"options": dict(self.options)} if self.options else {})


def read_conversion(directory: Path) -> Conversion | None:
    """What losart.json of a directory says; None where there is none.

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
        if key not in ("family", "block_length", "mask_token_id", "options"):
            raise ConfigError(f"{file}: {key} is not a key that losart knows")
    family = _required(keys, keys.optional_text("family"), "family")
    mask = _required(keys, keys.optional_integer("mask_token_id", 0), "mask_token_id")
    options = keys.optional_object("options")
    given = () if options is None else tuple(options.values.items())
    return Conversion.of(file, family, keys.integer("block_length"), mask, "family", given)


def _required(keys: JsonObject, value: Any, key: str) -> Any:
    if value is None:
        raise keys.missing(key)
    return value
