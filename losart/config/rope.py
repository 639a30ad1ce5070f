"""Frequencies of the rotary position embedding."""

from __future__ import annotations

import math

import numpy as np

from losart.config.model import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angles per position of each pair of channels, scaled as the configuration asks.

    Parameters
    ----------
    rope : RopeConfig
    head_dim : int
        Channels of a head; channel j is rotated together with channel j + head_dim / 2.

    Returns
    -------
    frequencies : ndarray of float64 [head_dim / 2]
        Radians per position.
    factor : float
        To be multiplied to cos and sin.
    """
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_dim), _yarn_factor(rope)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    return frequencies, 1.0


def _yarn(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    """arXiv 2309.00071: channels that turn often keep their frequency, slow ones are interpolated."""
    low = _channel_of_rotations(rope, rope.beta_fast, head_dim)
    high = _channel_of_rotations(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The bound of high counts channels, not pairs, as in the authors' code.
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies / rope.factor * interpolated + frequencies * (1.0 - interpolated)


def _channel_of_rotations(rope: RopeConfig, rotations: float, head_dim: int) -> float:
    """The pair of channels that turns `rotations` times over the pre-training context."""
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
    """Long waves are stretched, short ones kept, those between blended."""
    assert rope.original_max_positions is not None
    wavelengths = 2 * math.pi / frequencies
    kept = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / rope.factor
