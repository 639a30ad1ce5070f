"""The rotary embedding of config.json, in the style of transformers 4 or 5, to a RopeConfig."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from losart.config.rope import ROPE_KINDS, RopeConfig
from losart.errors import ConfigError
from losart.loaders.json_files import JsonObject, errors_naming

DEFAULT_THETA = 10000.0
ORIGINAL_MAX_POSITIONS = "original_max_position_embeddings"
# RopeConfig names its fields as the files do, except these.
_OTHER_NAMES = {
    "theta": "rope_theta",
    "kind": "rope_type",
    "original_max_positions": ORIGINAL_MAX_POSITIONS,
    "partial": "partial_rotary_factor",
    "query_beta": "llama_4_scaling_beta",
}
_KEYS = {_OTHER_NAMES.get(field.name, field.name) for field in fields(RopeConfig)}
_KEYS |= {"type"}


def rope_config(config: JsonObject, max_positions: int) -> RopeConfig:
    """The rotary embedding that config.json describes.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, which
    may hold one object per kind of layer.

    Raises
    ------
    ConfigError
        If a kind, key, or number is not supported.
    """
    scaling = config.optional_object("rope_scaling") or config.optional_object("rope_parameters")
    if scaling is None:
        scaling = JsonObject(config.file, {}, "rope_parameters.")
    scaling = scaling.optional_object("full_attention") or scaling

    # The kind first: the keys of an unsupported kind are unknown too, but are not the problem.
    kind = scaling.optional_text("rope_type") or scaling.optional_text("type") or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"{config.file}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    unknown = sorted(set(scaling.values) - _KEYS)
    if unknown:
        raise ConfigError(f"{config.file}: {scaling.prefix}{unknown[0]} is not a supported rope parameter")
    theta = scaling.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    if theta <= 1:
        raise scaling.error("rope_theta", theta, "larger than 1")
    # As in transformers, the length outside the rope parameters takes precedence.
    original = config.optional_integer(ORIGINAL_MAX_POSITIONS)
    original = original or scaling.optional_integer(ORIGINAL_MAX_POSITIONS)
    factor = scaling.optional_number("factor")
    if factor is None and kind == "yarn" and original is not None:
        factor = max_positions / original
    required = [] if kind == "default" or factor is not None else ["factor"]
    if kind == "llama3":
        required += ["low_freq_factor", "high_freq_factor"]
    for key in required:
        if scaling.get(key) is None:
            raise ConfigError(f"{scaling.missing(key)} of rope type {kind!r}")

    with errors_naming(config.file):
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=1.0 if factor is None else factor,
            partial=scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)),
            query_beta=scaling.number("llama_4_scaling_beta", 0.0),
            original_max_positions=(original or max_positions) if kind in ("yarn", "llama3") else None,
            attention_factor=scaling.optional_number("attention_factor"),
            # As in transformers, 0 means absent.
            beta_fast=scaling.optional_number("beta_fast") or RopeConfig.beta_fast,
            beta_slow=scaling.optional_number("beta_slow") or RopeConfig.beta_slow,
            mscale=scaling.optional_number("mscale"),
            mscale_all_dim=scaling.optional_number("mscale_all_dim"),
            truncate=scaling.boolean("truncate", True),
            low_freq_factor=scaling.number("low_freq_factor", RopeConfig.low_freq_factor),
            high_freq_factor=scaling.number("high_freq_factor", RopeConfig.high_freq_factor),
        )


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """Keys of config.json, in transformers 4's style, that `rope_config` reads as this embedding."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    always = {"kind", "factor"} | (
        {"low_freq_factor", "high_freq_factor"} if rope.kind == "llama3" else set()
    )
    plain = RopeConfig()
    scaling = {
        _OTHER_NAMES.get(field.name, field.name): getattr(rope, field.name)
        for field in fields(RopeConfig)
        if field.name != "theta"
        and (field.name in always or getattr(rope, field.name) != getattr(plain, field.name))
    }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
