"""config.json and generation_config.json to a ModelConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losart.config.model import ModelConfig
from losart.errors import ConfigError
from losart.loaders.conversion import Conversion
from losart.loaders.families import FAMILIES, Family, family_of, known_as, ordinary
from losart.loaders.families.family import ConfigFiles
from losart.loaders.json_files import errors_naming, read_json_object, read_optional_json_object
from losart.loaders.tokenizer import Tokenizer


def read_model_config(directory: Path, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The configuration of the checkpoint in `directory`: `read_family` without the family."""
    return read_family(directory, tokenizer)[0]


def read_family(
    directory: Path, tokenizer: Tokenizer | None = None, conversion: Conversion | None = None
) -> tuple[ModelConfig, Family]:
    """The configuration of the checkpoint in `directory`, and the family that reads its files.

    Parameters
    ----------
    directory : Path
        Holds config.json and perhaps generation_config.json.
    tokenizer : Tokenizer or None
        Its mask and end tokens are used where the files specify none.
    conversion : Conversion or None
        Says how the model decodes, which else must be one of a block-diffusion family.

    Raises
    ------
    CheckpointError
        If a file is missing or is not a JSON object.
    ConfigError
        If a key is missing, impossible, or asks for something that is not supported.
    """
    config = read_json_object(directory / "config.json")
    generation = read_optional_json_object(directory / "generation_config.json")
    model_type = config.optional_text("model_type")
    if model_type is None:
        raise config.missing("model_type")
    architectures = config.get("architectures") or []
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        raise config.error("architectures", architectures, "a list of names")
    files = ConfigFiles(config, generation, tokenizer)
    family = None if conversion is None else ordinary(model_type, architectures)
    if family is None:
        with errors_naming(config.file):
            model_type = known_as(model_type, architectures)
        family = family_of(model_type)
    values: dict[str, Any] = {"model_type": model_type, "decoding": family.decoding}
    values |= family.config_values(files)
    with errors_naming(config.file):
        base = ModelConfig(**values)
    if conversion is None:
        return base, family
    if model_type in FAMILIES and model_type != conversion.family:
        raise ConfigError(
            f"{conversion.file}: family is {conversion.family!r}, and that of {config.file} is {model_type!r}"
        )
    return conversion.applied(base), family
