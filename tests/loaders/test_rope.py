from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from losart.config.rope import RopeConfig, inverse_frequencies
from losart.loaders.families.rope import rope_config
from losart.loaders.json_files import JsonObject

YARN = RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_positions=32768)
LLAMA3 = RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192)


def test_default_is_a_geometric_series_from_one():
    frequencies, factor = inverse_frequencies(RopeConfig(theta=10000.0), 8)
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-14)
    assert frequencies.dtype == np.float64
    assert factor == 1.0


def test_linear_divides_every_frequency():
    plain, _ = inverse_frequencies(RopeConfig(theta=1e6), 64)
    scaled, factor = inverse_frequencies(RopeConfig(theta=1e6, kind="linear", factor=4.0), 64)
    np.testing.assert_allclose(scaled * 4, plain, rtol=1e-14)
    assert factor == 1.0


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_scaled_kinds_keep_fast_channels_and_stretch_slow_ones(rope):
    plain, _ = inverse_frequencies(dataclasses.replace(rope, kind="default"), 128)
    scaled, _ = inverse_frequencies(rope, 128)
    ratio = plain / scaled
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(rope.factor)
    assert np.all(np.diff(ratio) >= -1e-9)
    assert np.any((ratio > 1.01) & (ratio < rope.factor - 0.01))


def test_llama3_changes_over_at_the_named_wavelengths():
    plain, _ = inverse_frequencies(dataclasses.replace(LLAMA3, kind="default"), 128)
    scaled, _ = inverse_frequencies(LLAMA3, 128)
    turns = LLAMA3.original_max_positions * plain / (2 * math.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)


def test_yarn_factor():
    def factor(**options):
        return inverse_frequencies(dataclasses.replace(YARN, **options), 64)[1]

    assert factor() == pytest.approx(0.1 * math.log(4) + 1)
    assert factor(factor=1.0) == 1.0
    assert factor(attention_factor=0.75) == 0.75
    assert factor(mscale=2.0, mscale_all_dim=0.5) == pytest.approx(
        (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    )
    assert factor(mscale=2.0) == pytest.approx(0.1 * math.log(4) + 1), "one mscale alone does nothing"


def test_yarn_without_truncation_differs():
    whole, _ = inverse_frequencies(YARN, 128)
    exact, _ = inverse_frequencies(dataclasses.replace(YARN, truncate=False), 128)
    assert not np.allclose(whole, exact, rtol=1e-6)


STYLES = {
    "absent": {},
    "theta alone": {"rope_theta": 1e6},
    "linear, transformers 4": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear, transformers 5": {
        "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 12345.0}
    },
    "yarn of Qwen3": {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn with type": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn with no factor but null": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": None,
            "rope_theta": 1e6,
            "original_max_position_embeddings": 4096,
        }
    },
    "yarn with everything": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e5,
            "factor": 8.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "truncate": False,
        }
    },
    "yarn with attention_factor": {
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "yarn", "factor": 3.0, "attention_factor": 1.25, "mscale": 0.0},
    },
    "yarn of a short context": {
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    },
    "original length outside": {
        "rope_theta": 1e6,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512},
    },
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "per kind of layer": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 777.0}}
    },
}


@pytest.mark.parity
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("style", STYLES)
def test_equals_transformers_from_the_same_config(style, head_dim):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    keys = {"max_position_embeddings": 131072, **STYLES[style]}
    frequencies, factor = inverse_frequencies(
        rope_config(JsonObject(Path("config.json"), keys), 131072), head_dim
    )

    if style == "per kind of layer":  # a layout of other families, whose rotary modules read it
        keys = {**keys, "rope_parameters": keys["rope_parameters"]["full_attention"]}
    config = transformers.Qwen3Config(head_dim=head_dim, num_hidden_layers=2, **keys)
    theirs = Qwen3RotaryEmbedding(config)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.double().numpy(), rtol=2e-6)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
