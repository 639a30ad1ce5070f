"""config.json and generation_config.json to a ModelConfig."""

from __future__ import annotations

from pathlib import Path

from losart.config.model import ModelConfig
from losart.loaders.families import family_of, known_as
from losart.loaders.families.family import ConfigFiles
from losart.loaders.json_files import errors_naming, read_json_object, read_optional_json_object
from losart.loaders.tokenizer import Tokenizer


def read_model_config(directory: Path, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The configuration of the checkpoint in `directory`, as its family reads it.

    Parameters
    ----------
    directory : Path
        Holds config.json and perhaps generation_config.json.
    tokenizer : Tokenizer or None
        Its mask and end tokens are used where the files specify none.

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
    with errors_naming(config.file):
        model_type = known_as(model_type, architectures)
        family = family_of(model_type)
    values = family.config_values(ConfigFiles(config, generation, tokenizer))
    with errors_naming(config.file):
        return ModelConfig(model_type=model_type, **values)
