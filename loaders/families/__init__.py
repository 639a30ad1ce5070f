"""The registry of model families, one file each."""

from losart.errors import ConfigError
from losart.loaders.families.family import Family
from losart.loaders.families.sdar import SDAR
from losart.loaders.families.sdar_moe import SDAR_MOE

FAMILIES = {"sdar": SDAR, "sdar_moe": SDAR_MOE}
SUPPORTED_MODEL_TYPES = tuple(sorted(FAMILIES))


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises
    ------
    ConfigError
        If it is not supported.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "SUPPORTED_MODEL_TYPES", "Family", "family_of"]
