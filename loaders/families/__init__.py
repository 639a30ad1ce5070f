"""The registry of model families, one file each."""

from collections.abc import Sequence

from losart.errors import ConfigError
from losart.loaders.families.family import Family
from losart.loaders.families.fast_dllm import FAST_DLLM
from losart.loaders.families.llada2 import LLADA2
from losart.loaders.families.nemotron import NEMOTRON
from losart.loaders.families.ordinary import ORDINARY
from losart.loaders.families.sdar import SDAR
from losart.loaders.families.sdar_moe import SDAR_MOE
from losart.loaders.families.stable_diffcoder import STABLE_DIFFCODER

# By the `model_type` of config.json; families that have another's are known by their architecture.
FAMILIES = {
    "Fast_dLLM_Qwen": FAST_DLLM,
    "llada2_moe": LLADA2,
    "nemotron_labs_diffusion": NEMOTRON,
    "sdar": SDAR,
    "sdar_moe": SDAR_MOE,
    "stable_diffcoder": STABLE_DIFFCODER,
}
SUPPORTED_MODEL_TYPES = tuple(sorted(FAMILIES))
# A model type of other models, and the family whose checkpoints have it too.
BORROWED = {"llama": "stable_diffcoder"}
_UNLESS = "unless losart.json, an adapter's or its own, says that it was trained to"


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


def ordinary(model_type: str, architectures: Sequence[str]) -> Family | None:
    """The family of a checkpoint that predicts the next token; None if it is another's, or not known."""
    named = {name for family in FAMILIES.values() for name in family.architectures}
    return None if named & set(architectures) else ORDINARY.get(model_type)


def known_as(model_type: str, architectures: Sequence[str]) -> str:
    """The registry's name of checkpoints with such keys in config.json.

    Raises
    ------
    ConfigError
        If it is not supported, or the keys contradict each other.
    """
    owners = {name: key for key, family in FAMILIES.items() for name in family.architectures}
    named = {owners[name]: name for name in architectures if name in owners}
    if model_type in BORROWED:
        if BORROWED[model_type] not in named:
            supported = ", ".join(FAMILIES[BORROWED[model_type]].architectures)
            raise ConfigError(
                f"model_type {model_type!r} predicts the next token, and does not fill in blocks: of such "
                f"models only {supported} is supported, {_UNLESS}"
            )
        return BORROWED[model_type]
    if model_type in ORDINARY:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}; it "
            f"predicts the next token, and does not fill in blocks, {_UNLESS}"
        )
    family_of(model_type)
    for owner, name in named.items():
        if owner != model_type:
            raise ConfigError(f"architectures names {name!r}, which is not of model_type {model_type!r}")
    return model_type


__all__ = ["FAMILIES", "SUPPORTED_MODEL_TYPES", "Family", "family_of", "known_as", "ordinary"]
