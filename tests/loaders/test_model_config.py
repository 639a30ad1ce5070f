from __future__ import annotations

import pytest

from losart.config import ModelConfig, RopeConfig


class FakeTokenizer:
    """The two facts of a tokenizer that the configuration falls back on."""

    def __init__(self, mask_token_id=None, eos_token_id=None):
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id


def test_a_released_configuration(read_config):
    assert read_config({"eos_token_id": [151645, 151643]}, block_size=16) == ModelConfig(
        model_type="sdar",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_positions=32768,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        tie_embeddings=True,
        block_length=16,
        mask_token_id=151669,
        end_token_ids=(151645, 151643),
        dtype="bfloat16",
    )


def test_defaults_of_absent_keys(read_config):
    absent = (
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "torch_dtype",
        "rope_theta",
    )
    config = read_config(**dict.fromkeys(absent, ...))
    assert config.head_dim == 2048 // 16
    assert config.num_kv_heads == 16
    assert config.rms_norm_eps == 1e-6
    assert config.tie_embeddings is False
    assert (config.qkv_bias, config.o_bias) == (False, False)
    assert config.dtype is None
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.block_length is None


def test_style_of_transformers_5(read_config):
    rope = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 8192}
    config = read_config(
        rope_theta=..., rope_scaling=..., rope_parameters=rope, torch_dtype=..., dtype="float16"
    )
    assert config.rope == RopeConfig(theta=5e6, kind="yarn", factor=4.0, original_max_positions=8192)
    assert config.dtype == "float16"


def test_yarn_without_an_original_length_takes_the_maximum(read_config):
    config = read_config(rope_scaling={"type": "yarn", "factor": 2.0})
    assert config.rope.original_max_positions == 32768


@pytest.mark.parametrize(
    ("changes", "generation", "expected"),
    [
        ({"block_length": 8, "block_size": 4}, {"block_length": 2}, 8),
        ({"block_size": 4}, {"block_length": 2}, 4),
        ({}, {"block_length": 2}, 2),
        ({}, {"block_size": 32}, 32),
        ({"block_length": None}, {}, None),
        ({"block_length": 32768}, {}, 32768),
    ],
)
def test_where_the_block_length_comes_from(read_config, changes, generation, expected):
    assert read_config(generation, **changes).block_length == expected


@pytest.mark.parametrize(
    ("changes", "generation", "token", "expected"),
    [
        ({"mask_token_id": 5}, {"mask_token_id": 6}, 7, 5),
        ({"mask_token_id": ...}, {"mask_token_id": 6}, 7, 6),
        ({"mask_token_id": None}, {}, 0, 0),
        ({"mask_token_id": ...}, {}, None, 151669),
        ({"mask_token_id": ..., "vocab_size": 151669}, {}, None, None),
    ],
)
def test_where_the_mask_token_comes_from(read_config, changes, generation, token, expected):
    assert read_config(generation, FakeTokenizer(mask_token_id=token), **changes).mask_token_id == expected


@pytest.mark.parametrize(
    ("generation", "config", "token", "expected"),
    [
        (3, 4, 5, (3,)),
        ([3, 6, 3], 4, 5, (3, 6)),
        (None, 4, 5, (4,)),
        (None, [0, 4], 5, (0, 4)),
        (None, None, 5, (5,)),
        (None, None, None, ()),
    ],
)
def test_where_the_end_tokens_come_from(read_config, generation, config, token, expected):
    found = read_config({"eos_token_id": generation}, FakeTokenizer(eos_token_id=token), eos_token_id=config)
    assert found.end_token_ids == expected
