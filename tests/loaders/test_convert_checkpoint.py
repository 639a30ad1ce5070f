"""Checkpoints that are written as plain directories: what is in them, and that they generate the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import products, write_adapter
from gguf_files import parts_of, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from quantized import compressed, quantize_checkpoint
from safetensors.numpy import load_file

import losart
from losart.backends.cpu.convert import float32_of, narrow
from losart.cli import main
from losart.config.precision import FORMATS
from losart.config.rope import RopeConfig
from losart.errors import CheckpointError, ConfigError, OptionError, TensorError
from losart.loaders import open_checkpoint
from losart.loaders.families.rope import rope_config, rope_keys
from losart.loaders.json_files import JsonObject
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import convert_checkpoint, loaded_tensors

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_layers": 2, "head_dim": 64}
CONVERSION = {"family": "Fast_dLLM_Qwen", "block_length": 8, "mask_token_id": 315}
PROMPT = np.random.default_rng(0).integers(0, 300, 50).tolist()
OPTIONS = {"max_new_tokens": 20, "stop_token_ids": []}


def adapter_of(base: Path, directory: Path, **more: object) -> Path:
    adapter = write_adapter(directory, products(base, {"q_proj": 4, "down_proj": 4}, std=0.02))
    (adapter / "losart.json").write_text(json.dumps(CONVERSION | more))
    return adapter


def agree(converted: Path, source: object, adapter: Path | None, dtype: str) -> None:
    """Each number is the one that loading holds, rounded once."""
    before = open_checkpoint(source, adapter)
    after = open_checkpoint(converted).tensors
    for name, tensor in loaded_tensors(before, "auto", "cuda").items():
        values = narrow(float32_of(tensor, 0, tensor.shape[0]), FORMATS[dtype])
        np.testing.assert_array_equal(after[name].array(), values)
        assert after[name].dtype == dtype


@pytest.mark.parametrize("family", ["stable_diffcoder", "Fast_dLLM_Qwen", "sdar"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gguf_with_an_adapter(tmp_path, family, dtype):
    base = write_checkpoint(tmp_path / "base", **SIZES, family=family, tied=family == "sdar")
    file = write_gguf(tmp_path / "x.gguf", *parts_of(base, family, "F32" if dtype == "float32" else "Q8_0"))
    more = {"options": {"confidence_threshold": 0.4, "sub_block_length": 4}}
    adapter = adapter_of(base, tmp_path / "adapter", family=family, **more)
    (adapter / "README.md").write_text("the card")
    told = []
    new = convert_checkpoint(
        open_checkpoint(file, adapter), tmp_path / "new", dtype, lambda *n: told.append(n)
    )
    agree(new, file, adapter, dtype)
    assert told[-1][0] == told[-1][1] and (new / "README.md").read_text() == "the card"
    assert open_checkpoint(new).config.decoding == open_checkpoint(file, adapter).config.decoding
    texts = ["Why is the sky blue?", "1234, é, 漢"]
    models = losart.load(file, "cpu", "float32", adapter=adapter), losart.load(new, "cpu", "float32")
    tokens = [[model.tokenizer.encode(text) for text in texts] for model in models]
    assert tokens[0] == tokens[1]
    if dtype == "float32":
        results = [model.generate(PROMPT, **OPTIONS).token_ids for model in models]
        assert results[0] == results[1]
    assert json.loads((new / "losart.json").read_text()) == CONVERSION | more | {"family": family}


@pytest.mark.parametrize("tied", [False, True])
def test_a_directory_with_an_adapter(tmp_path, tied):
    base = write_checkpoint(tmp_path / "base", **SIZES, tied=tied)
    adapter = write_adapter(tmp_path / "adapter", products(base, {"q_proj": 4, "up_proj": 4}))
    new = convert_checkpoint(open_checkpoint(base, adapter), tmp_path / "new")
    agree(new, base, adapter, "float32")
    assert not (new / "losart.json").exists()  # the family's own configuration says all
    results = [
        losart.load(path, "cpu", adapter=more).generate(PROMPT, **OPTIONS).token_ids
        for path, more in ((base, adapter), (new, None))
    ]
    assert results[0] == results[1]


def test_an_embedding_that_is_replaced_and_the_head_that_is_not(tmp_path):
    """They were one, and are two from then on."""
    base = write_checkpoint(tmp_path / "base", **SIZES, tied=True)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tensors = products(base, {"q_proj": 4})
    tensors["base_model.model.model.embed_tokens.weight"] = embedding[::-1].copy()
    adapter = write_adapter(
        tmp_path / "adapter", tensors, modules_to_save=["embed_tokens"], target_modules=["q_proj"]
    )
    new = convert_checkpoint(open_checkpoint(base, adapter), tmp_path / "new")
    saved = open_checkpoint(new)
    assert not saved.config.tie_embeddings
    np.testing.assert_array_equal(saved.tensors["embed"].array(), embedding[::-1])
    np.testing.assert_array_equal(saved.tensors["head"].array(), embedding)


def test_codes_are_widened(tmp_path):
    base = write_checkpoint(tmp_path / "base", **SIZES)
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    packed = {"format": "pack-quantized", "dtype": "int4", "block": (1, 32)}
    quantize_checkpoint(base, config, lambda rng, rows, columns: compressed(rng, rows, columns, **packed))
    new = convert_checkpoint(open_checkpoint(base), tmp_path / "new", "bfloat16")
    keys = json.loads((new / "config.json").read_text())
    assert "quantization_config" not in keys and keys["torch_dtype"] == "bfloat16"
    agree(new, base, None, "bfloat16")


def test_what_fails_leaves_nothing(tmp_path):
    base = write_checkpoint(tmp_path / "base", **SIZES)
    adapter = adapter_of(base, tmp_path / "adapter", family="sdar")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[:] = np.nan
    write_adapter(adapter, tensors)
    with pytest.raises(TensorError, match="adapter_model"):
        convert_checkpoint(open_checkpoint(base, adapter), tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match="new: exists"):
        convert_checkpoint(open_checkpoint(base), tmp_path / "new")
    with pytest.raises(OptionError, match="dtype"):
        convert_checkpoint(open_checkpoint(base), tmp_path / "other", "int3")


def test_the_command(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", **SIZES)
    file = write_gguf(tmp_path / "x.gguf", *parts_of(base, "sdar", "Q4_0"))
    assert main(["convert", str(file), str(tmp_path / "new"), "--dtype", "float16"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new'}: ")
    assert (
        main(["generate", str(tmp_path / "new"), "--device", "cpu", "--prompt", "x", "--max-new-tokens", "4"])
        == 0
    )
    assert main(["convert", str(file), str(tmp_path / "new")]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 2.0}, "confidence_threshold"),
        ({"budgets": 3}, "unknown option"),
        ({"block_length": 16}, "block_length"),
        ({"budget": 64}, "budget"),
    ],
)
def test_options_of_losart_json_that_are_none(tmp_path, options, said):
    base = write_checkpoint(tmp_path / "base", **SIZES)
    adapter = adapter_of(base, tmp_path / "adapter", options=options)
    keys = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(keys | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    )
    with pytest.raises(ConfigError, match=f"losart.json: options: .*{said}"):
        open_checkpoint(base, adapter)


def test_options_of_losart_json_are_defaults(tmp_path):
    base = write_checkpoint(tmp_path / "base", **SIZES)
    adapter = adapter_of(base, tmp_path / "adapter", family="sdar", options={"denoising_steps": 2})
    model = losart.load(base, "cpu", adapter=adapter)
    stats = model.generate(PROMPT[:48], **OPTIONS | {"max_new_tokens": 16}).stats
    assert stats.denoising_passes <= 4
    given = OPTIONS | {"max_new_tokens": 16, "denoising_steps": 8, "remasking": "sequential"}
    assert model.generate(PROMPT[:48], **given).stats.denoising_passes == 16


@given(
    st.sampled_from(["default", "linear", "yarn", "llama3"]),
    st.floats(1.5, 1e7),
    st.floats(1.0, 64.0),
    st.integers(16, 8192),
    st.sampled_from([{}, {"beta_fast": 16.0, "mscale": 0.7, "truncate": False}, {"attention_factor": 1.25}]),
)
def test_rope_is_read_as_it_was_written(kind, theta, factor, original, more):
    positions = 16384
    scaled = {} if kind == "default" else {"factor": factor}
    if kind in ("yarn", "llama3"):
        scaled |= {"original_max_positions": original}
    if kind == "yarn":
        scaled |= more
    rope = RopeConfig(theta=theta, kind=kind, **scaled)
    keys = json.loads(json.dumps(rope_keys(rope)))
    assert rope_config(JsonObject(Path("config.json"), keys), positions) == rope
