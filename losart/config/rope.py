"""The rotary position embedding: its configuration and its frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from losart.config.checks import is_int, is_number
from losart.errors import ConfigError

ROPE_KINDS = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes
    ----------
    theta : float
        Base of the frequencies.
    partial : float
        Share of a head's channels that are rotated: the first ones.
    query_beta : float
        Queries at position p are multiplied by 1 + query_beta * ln(1 + floor(p / original_max_positions)).
    kind : {"default", "linear", "yarn", "llama3"}
        How the frequencies are scaled to longer contexts.
    factor : float
        Scaling factor (all kinds but "default").
    original_max_positions : int or None
        Context length of pre-training (yarn, llama3).
    attention_factor : float or None
        yarn: factor on cos and sin; None computes it from `factor` (and the mscales).
    beta_fast, beta_slow, mscale, mscale_all_dim, truncate
        yarn (arXiv 2309.00071), named as in Hugging Face's configurations.
    low_freq_factor, high_freq_factor : float
        llama3.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    partial: float = 1.0
    query_beta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(f"rope type {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        for name in ("theta", "factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ConfigError(f"rope {name} must be a positive number, not {value!r}")
        if not is_number(self.partial) or not 0 < self.partial <= 1:
            raise ConfigError(f"partial_rotary_factor must be above 0 and at most 1, not {self.partial!r}")
        if not is_number(self.query_beta) or self.query_beta < 0:
            raise ConfigError(f"llama_4_scaling_beta must be a number, 0 or more, not {self.query_beta!r}")
        original = self.original_max_positions
        if self.query_beta and not original:
            raise ConfigError("llama_4_scaling_beta needs original_max_position_embeddings")
        if self.kind in ("yarn", "llama3") and (original is None or not is_int(original) or original <= 0):
            raise ConfigError(
                f"rope type {self.kind!r} needs original_max_position_embeddings, a positive integer, "
                f"not {original!r}"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError("rope high_freq_factor must be larger than low_freq_factor")
        if self.kind == "yarn":
            self._check_yarn()

    def _check_yarn(self) -> None:
        factor = self.attention_factor
        if factor is not None and (not is_number(factor) or factor <= 0):
            raise ConfigError(f"rope attention_factor must be a positive number, not {factor!r}")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value < 0):
                raise ConfigError(f"rope {name} must be a number, 0 or more, not {value!r}")
        if self.beta_fast <= self.beta_slow:
            raise ConfigError(
                f"rope beta_fast ({self.beta_fast}) must be larger than beta_slow ({self.beta_slow})"
            )


def rotated_channels(rope: RopeConfig, head_dim: int) -> int:
    """Channels of a head that are rotated.

    Raises
    ------
    ConfigError
        Their number is odd.
    """
    rotated = int(head_dim * rope.partial)
    if rotated % 2 or not rotated:
        raise ConfigError(f"of a head's {head_dim} channels {rotated} cannot be rotated in pairs")
    return rotated


def query_factors(rope: RopeConfig, positions: np.ndarray) -> np.ndarray:
    """What queries at these positions are multiplied by: float32 [positions]."""
    assert rope.original_max_positions is not None
    lengths = np.floor(positions / np.float32(rope.original_max_positions)).astype(np.float32)
    return (1 + np.float32(rope.query_beta) * np.log(1 + lengths)).astype(np.float32)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of channels, scaled as the configuration says.

    Parameters
    ----------
    rope : RopeConfig
    head_dim : int
        Channels of a head. Of the first `partial` of them, `rotated`, channel j is rotated together with
        channel j + rotated / 2.

    Returns
    -------
    frequencies : ndarray of float64 [rotated / 2]
        Radians per position.
    factor : float
        Scales cos and sin.
    """
    head_dim = rotated_channels(rope, head_dim)
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_dim), _yarn_factor(rope)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    return frequencies, 1.0


def _yarn(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    """arXiv 2309.00071: fast channels keep their frequency, slow ones are interpolated."""
    low = _channel_of_rotations(rope, rope.beta_fast, head_dim)
    high = _channel_of_rotations(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # As in the authors' code, `high` is bounded by the number of channels, not of pairs.
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies / rope.factor * interpolated + frequencies * (1.0 - interpolated)


def _channel_of_rotations(rope: RopeConfig, rotations: float, head_dim: int) -> float:
    """The (fractional) pair of channels that rotates `rotations` times over the pre-training context."""
    assert rope.original_max_positions is not None
    positions_per_radian = rope.original_max_positions / (rotations * 2 * math.pi)
    return head_dim * math.log(positions_per_radian) / (2 * math.log(rope.theta))


def _yarn_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those in between blended."""
    assert rope.original_max_positions is not None
    wavelengths = 2 * math.pi / frequencies
    kept = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / rope.factor
