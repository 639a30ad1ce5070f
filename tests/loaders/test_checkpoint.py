from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from losart.errors import CheckpointError, ConfigError, TensorError
from losart.loaders import SUPPORTED_MODEL_TYPES, open_checkpoint
from losart.measure.random_checkpoint import SIZES, write_checkpoint


@pytest.fixture
def edited(make_checkpoint):
    """Open a checkpoint after an edit of its tensors, given by their names in the file."""

    def edited(edit, **options):
        directory = make_checkpoint(**options)
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")
        return open_checkpoint(directory)

    return edited


def rewrite_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_tensors_have_canonical_names_and_shapes(make_checkpoint):
    checkpoint = open_checkpoint(
        make_checkpoint(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, bias=True)
    )
    layer = {
        "input_norm": (32,),
        "q": (64, 32),
        "k": (32, 32),
        "v": (32, 32),
        "o": (32, 64),
        "q_bias": (64,),
        "k_bias": (32,),
        "v_bias": (32,),
        "o_bias": (32,),
        "q_norm": (16,),
        "k_norm": (16,),
        "post_norm": (32,),
        "gate": (48, 32),
        "up": (48, 32),
        "down": (32, 48),
    }
    expected = {"embed": (320, 32), "final_norm": (32,), "head": (320, 32)}
    expected |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected


def test_values_go_with_their_names(make_checkpoint):
    directory = make_checkpoint()
    checkpoint = open_checkpoint(str(directory))
    saved = load_file(directory / "model.safetensors")
    for name, source in [
        ("embed", "model.embed_tokens.weight"),
        ("head", "lm_head.weight"),
        ("final_norm", "model.norm.weight"),
        ("layers.0.k", "model.layers.0.self_attn.k_proj.weight"),
        ("layers.0.post_norm", "model.layers.0.post_attention_layernorm.weight"),
        ("layers.0.up", "model.layers.0.mlp.up_proj.weight"),
    ]:
        np.testing.assert_array_equal(checkpoint.tensors[name].array(), saved[source])


def test_parts_belong_together(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert checkpoint.path == tiny_checkpoint
    assert checkpoint.config.mask_token_id == checkpoint.tokenizer.mask_token_id
    prompt = checkpoint.chat_template.render([{"role": "user", "content": "hi"}])
    assert checkpoint.tokenizer.encode(prompt)[0] == checkpoint.tokenizer.token_to_id("<|im_start|>")


def test_checkpoint_without_tokenizer(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint(tokenizer=False, vocab_size=50))
    assert checkpoint.tokenizer is None
    assert checkpoint.chat_template is None
    assert checkpoint.config.mask_token_id == 45


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_hold_the_same_values_as_one_file(make_checkpoint, dtype):
    one = open_checkpoint(make_checkpoint("one", dtype=dtype, num_layers=2))
    many = open_checkpoint(make_checkpoint("many", dtype=dtype, num_layers=2, shards=3))
    assert len({tensor.file for tensor in many.tensors.values()}) == 3
    assert one.tensors.keys() == many.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor.array(), many.tensors[name].array())


def test_tied_embeddings_need_no_head(edited):
    assert "head" not in edited(lambda tensors: None, tied=True).tensors


def test_harmless_leftovers(edited):
    def leave(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    checkpoint = edited(leave, tied=True)
    assert "head" not in checkpoint.tensors
    assert not any("rotary" in name for name in checkpoint.tensors)


def drop(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight"]


def drop_head(tensors):
    del tensors["lm_head.weight"]


def add(tensors):
    tensors["model.layers.0.mlp.router.weight"] = np.ones(3, np.float32)


def add_layer(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]


def add_bias(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float32)


def transpose(tensors):
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = np.ascontiguousarray(down.T)


def flatten(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][None]


def widen(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, r"missing tensors: 'model\.layers\.0\.mlp\.up_proj\.weight'"),
        (drop_head, r"missing tensors: 'lm_head\.weight'"),
        (add, r"unknown tensors: 'model\.layers\.0\.mlp\.router\.weight'"),
        (add_layer, r"unknown tensors: 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (add_bias, r"unknown tensors: 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
        (transpose, r"'model\.layers\.0\.mlp\.down_proj\.weight' has the shape \[48, 32\].*\[32, 48\]"),
        (flatten, r"'model\.norm\.weight' has the shape \[1, 32\].*\[32\]"),
        (widen, r"'model\.norm\.weight' has the dtype F64; supported: float32, bfloat16, float16"),
    ],
)
def test_tensors_that_do_not_fit(edited, edit, message):
    with pytest.raises(TensorError, match=message):
        edited(edit)


def test_configuration_of_far_too_many_layers(make_checkpoint):
    directory = make_checkpoint()
    rewrite_config(directory, num_hidden_layers=2**31 - 1)
    with pytest.raises(TensorError, match=r"missing tensors: 'model\.layers\.1\..*, \.\.\.$"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads"]
)
def test_configuration_that_does_not_fit_the_tensors(make_checkpoint, key):
    directory = make_checkpoint()
    config = json.loads((directory / "config.json").read_text())
    rewrite_config(directory, **{key: config[key] * 2})
    with pytest.raises(TensorError, match="has the shape"):
        open_checkpoint(directory)


def test_unsupported_model_type(make_checkpoint):
    directory = make_checkpoint(extra_config={"model_type": "llada"})
    with pytest.raises(ConfigError, match=rf"config\.json: .*'llada' is not .*{SUPPORTED_MODEL_TYPES[0]}"):
        open_checkpoint(directory)


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(make_checkpoint, name):
    directory = make_checkpoint()
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(directory)


def test_truncated_weights(make_checkpoint):
    directory = make_checkpoint()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a sound safetensors file"):
        open_checkpoint(directory)


def test_seed_decides_the_weights(tmp_path):
    def embed(name, seed):
        directory = write_checkpoint(tmp_path / name, seed=seed, num_layers=1)
        return open_checkpoint(directory).tensors["embed"].array()

    first = embed("first", 1)
    np.testing.assert_array_equal(first, embed("again", 1))
    assert not np.array_equal(first, embed("other", 2))


def test_bfloat16_weights_are_the_rounded_float32_ones(make_checkpoint):
    exact = open_checkpoint(make_checkpoint("exact")).tensors["embed"].array()
    bits = open_checkpoint(make_checkpoint("rounded", dtype="bfloat16")).tensors["embed"].array()
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, rtol=2**-8)


def test_big_vocabulary_has_the_ids_of_sdar(tmp_path):
    size = SIZES["0.6B"] | {
        "num_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 8,
        "head_dim": 2,
    }
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, **size))
    assert checkpoint.config.mask_token_id == checkpoint.tokenizer.mask_token_id == 151669
    assert checkpoint.config.end_token_ids == (151645, 151643)
    assert checkpoint.tokenizer.decode([150000]) != ""
    shutil.rmtree(tmp_path)
