from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released_config import SDAR_1_7B

from losart.errors import CheckpointError, ConfigError, LosartError
from losart.loaders.model_config import read_model_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3' is not supported; supported: .*sdar"),
        ({"model_type": "llama"}, "model_type 'llama' predicts the next token, .*StableDiffcoderForCausalLM"),
        ({"model_type": ...}, "missing key 'model_type'"),
        ({"model_type": ["sdar"]}, "model_type must be a string"),
        ({"hidden_size": ...}, "missing key 'hidden_size'"),
        ({"vocab_size": None}, "missing key 'vocab_size'"),
        ({"max_position_embeddings": ...}, "missing key 'max_position_embeddings'"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads"),
        ({"head_dim": 127}, "head_dim must be even"),
        ({"head_dim": ..., "hidden_size": 8}, "head_dim must be a positive integer"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', not 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be 'full_attention'"),
        ({"layer_types": "full_attention"}, "layer_types must be"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"torch_dtype": 16}, "torch_dtype must be a string"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0 and below 1"),
        ({"rms_norm_eps": 1}, "rms_norm_eps must be a number above 0 and below 1"),
        ({"rms_norm_eps": 1e308}, "rms_norm_eps must be a number above 0 and below 1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
        ({"mask_token_id": 151936}, "mask_token_id must be inside the vocabulary of 151936, not 151936"),
        ({"mask_token_id": -1}, "mask_token_id must be an integer from 0"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be an integer"),
        ({"eos_token_id": [1, 999999]}, "eos_token_id must be inside the vocabulary of 151936, not 999999"),
        ({"block_size": 0}, "block_size must be an integer from 1"),
        ({"block_length": 4.0}, "block_length must be an integer from 1"),
        ({"block_size": 32769}, r"block_size must be at most max_position_embeddings \(32768\), not 32769"),
        ({"rope_theta": "1e6"}, "rope_theta must be a number"),
        ({"rope_theta": 0}, "rope_theta must be larger than 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "rope type 'longrope' is not supported; supported: default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, "missing key 'rope_scaling.factor' of rope type 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "missing key 'rope_scaling.factor'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope factor must be a positive number"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 0}},
            "rope_scaling.truncate must be true",
        ),
        *(
            ({"rope_scaling": {"type": "yarn", "factor": 2, **keys}}, message)
            for keys, message in (
                ({"attention_factor": 0}, "rope attention_factor must be a positive number, not 0"),
                ({"attention_factor": -1.5}, "rope attention_factor must be a positive number, not -1.5"),
                ({"mscale": -1}, "rope mscale must be a number, 0 or more, not -1"),
                ({"mscale_all_dim": -1}, "rope mscale_all_dim must be a number, 0 or more, not -1"),
                ({"beta_fast": 2, "beta_slow": 2}, r"rope beta_fast \(2.0\) must be larger than beta_slow"),
                ({"beta_slow": 33}, r"rope beta_fast \(32.0\) must be larger than beta_slow \(33.0\)"),
            )
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "missing key 'rope_scaling.low_freq_factor'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "mrope_section is not a supported"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be above 0 and at most 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0}}, "partial_rotary_factor must be above 0"),
        ({"architectures": "SDARForCausalLM"}, "architectures must be a list of names"),
        ({"architectures": ["LLaDA2MoeModelLM"]}, "'LLaDA2MoeModelLM', which is not of model_type 'sdar'"),
    ],
)
def test_what_is_refused(read_config, changes, message):
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        read_config(**changes)


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "16", True, [16], {}, math.nan, math.inf, 2**31, 10**400])
@pytest.mark.parametrize("key", SIZES)
def test_impossible_sizes_name_file_and_key(read_config, key, value):
    with pytest.raises(ConfigError, match=rf"config\.json: {key} must be"):
        read_config(**{key: value})


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id must be"),
        ({"eos_token_id": [151936]}, "eos_token_id must be inside the vocabulary of 151936"),
        ({"mask_token_id": 151936}, "mask_token_id must be inside the vocabulary of 151936"),
        ({"block_length": 10**6}, "block_length must be at most max_position_embeddings"),
    ],
)
def test_error_in_generation_config_names_that_file(read_config, generation, message):
    with pytest.raises(ConfigError, match=rf"/generation_config\.json: {message}"):
        read_config(generation, mask_token_id=...)


def test_a_block_longer_than_the_positions_is_no_model(read_config):
    with pytest.raises(ConfigError, match=r"block_length \(32769\) .* max_positions \(32768\)"):
        dataclasses.replace(read_config(), block_length=32769)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_files_that_are_not_json_objects(read_config, tmp_path, name, content, message):
    read_config()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"/{name}: {message}"):
        read_model_config(tmp_path)


def test_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_model_config(tmp_path)


ROPE_KEYS = [
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "mscale",
    "low_freq_factor",
    "high_freq_factor",
    "full_attention",
]
OTHER_KEYS = [
    "block_length",
    "block_size",
    "rope_parameters",
    "dtype",
    "layer_types",
    "original_max_position_embeddings",
    "partial_rotary_factor",
]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.integers()
    | st.floats()
    | st.sampled_from(["sdar", "silu", "yarn", "linear", "llama3", "default", "float16", "", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=6)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*SDAR_1_7B, *OTHER_KEYS]), ANYTHING, min_size=1, max_size=3))
def test_any_values_give_a_configuration_or_an_error_of_ours(changes):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(SDAR_1_7B | changes))
        try:
            config = read_model_config(Path(folder))
        except LosartError as error:
            assert str(file) in str(error)
        else:
            assert config.num_heads % config.num_kv_heads == 0
            assert config.rope.theta > 1
