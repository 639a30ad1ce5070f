"""`losart quantize`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import losart
from losart.backends.cpu.quantized_linear import QuantizedMatrix
from losart.cli import main
from losart.errors import OptionError
from losart.loaders import open_checkpoint
from losart.measure.random_checkpoint import write_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "head_dim": 32}


@pytest.mark.parametrize(
    ("arguments", "formats"),
    [
        ((), {"layers.1.down": ("int4", 64), "head": None}),
        (("--weights", "int4", "--group", "32"), {"layers.0.q": ("int4", 32), "head": None}),
        (("--weights", "int8", "--head", "int4"), {"layers.1.down": ("int8", 128), "head": ("int4", 64)}),
        (("--weights", "fp8", "--head", "int8"), {"layers.0.up": ("float8", 64), "head": ("int8", 64)}),
    ],
)
def test_what_is_asked_for_is_written_and_answers(capsys, tmp_path, arguments, formats):
    source = write_checkpoint(tmp_path / "source", dtype="bfloat16", **SIZES)
    assert main(["quantize", str(source), str(tmp_path / "new"), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'new'}: ") and "of weights, before" in printed.out
    tensors = open_checkpoint(tmp_path / "new").tensors
    for name, format in formats.items():
        if format is None:
            assert tensors[name].dtype == "bfloat16"
        else:
            assert (tensors[name].dtype, tensors[name].group) == format
    result = losart.load(tmp_path / "new", "cpu").generate("a", max_new_tokens=8, stop_token_ids=[])
    assert len(result.token_ids) == 8
    assert main(["inspect", str(tmp_path / "new")]) == 0
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    assert f" in {dtypes}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("{source}", "{source}"), 1, "source: exists"),
        (("{tmp}/nowhere", "{tmp}/new"), 1, "nowhere: no such directory"),
        (("{source}", "{tmp}/new", "--group", "12"), 2, "group must be a multiple of 8"),
        (("{source}", "{tmp}/new", "--group", "0"), 2, "must be a whole number from 1"),
        (
            ("{source}", "{tmp}/new", "--group", "48"),
            2,
            "groups of 48 do not divide the 64 columns of tensor",
        ),
        (("{source}", "{tmp}/new", "--calibrate", "{tmp}/none.txt"), 1, "none.txt"),
        (
            ("{source}", "{tmp}/new", "--calibrate", "{source}/short.txt"),
            1,
            "calibration needs 256 or more",
        ),
        (("{source}", "{tmp}/new", "--calibrate", "{source}/model.safetensors"), 1, "is no text in UTF-8"),
        (("{source}", "{tmp}/new", "--weights", "int3"), 2, "invalid choice: 'int3'"),
        (("{source}", "{tmp}/new", "--weights", "fp8", "--group", "64"), 2, "fp8 has a scale per row"),
    ],
)
def test_wrong_arguments(capsys, tmp_path, arguments, code, says):
    source = write_checkpoint(tmp_path / "source", **SIZES)
    (source / "short.txt").write_text("too short")
    filled = [text.format(source=source, tmp=tmp_path) for text in arguments]
    try:
        found = main(["quantize", *filled])
    except SystemExit as exit:
        found = exit.code
    assert found == code and says in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_that_are_rounded_while_loading_are_those_of_the_written_checkpoint(
    capsys, tmp_path, weights
):
    source = write_checkpoint(tmp_path / "source", dtype="bfloat16", **SIZES)
    assert main(["quantize", str(source), str(tmp_path / "new"), "--weights", weights, "--head", "int8"]) == 0
    options = {"max_new_tokens": 24, "stop_token_ids": []}
    loaded = losart.load(source, "cpu", weights=weights)
    written = losart.load(tmp_path / "new", "cpu")
    assert loaded.generate("text", **options).token_ids == written.generate("text", **options).token_ids
    assert loaded.fingerprint != losart.load(source, "cpu").fingerprint
    capsys.readouterr()
    facts = []
    for arguments in ((str(source), "--weights", weights), (str(tmp_path / "new"),)):
        assert main(["inspect", *arguments, "--device", "cpu", "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    runner = loaded._engine.runner
    matrices = [runner.head.matrices[0], runner.embedding.matrices[0]]
    vectors = [runner.final_norm]
    for layer in runner.layers:
        for weight in (layer.qkv, layer.o, layer.feed_forward.gate_up, layer.feed_forward.down):
            matrices += weight.matrices
        vectors += [layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm]
    assert loaded.weights == written.weights == tuple(sorted({"bfloat16", "int8", weights}))
    for one in facts:
        assert one["matrix_bytes"] == loaded.matrix_bytes == written.matrix_bytes
        assert one["weight_bytes"] == sum(array.nbytes for array in (*matrices, *vectors))


@pytest.mark.parametrize(
    ("weights", "says"),
    [("int3", "weights must be one of auto, int8, int4, fp8, not 'int3'")],
)
def test_weights_that_cannot_be_loaded(tmp_path, weights, says):
    source = write_checkpoint(tmp_path / "source", **SIZES)
    with pytest.raises(OptionError, match=says):
        losart.load(source, "cpu", weights=weights)


def test_weights_are_not_rounded_twice(tmp_path):
    source = write_checkpoint(tmp_path / "source", **SIZES)
    assert main(["quantize", str(source), str(tmp_path / "new")]) == 0
    with pytest.raises(OptionError, match="new: is quantized"):
        losart.load(tmp_path / "new", "cpu", weights="int8")


def test_a_head_that_is_the_embedding_is_rounded_by_itself(tmp_path):
    """As if it were one of its own that holds the same."""
    tied = write_checkpoint(tmp_path / "tied", tied=True, **SIZES)
    own = write_checkpoint(tmp_path / "own", **SIZES)
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, own / "model.safetensors")
    models = [losart.load(path, "cpu", weights="int8") for path in (tied, own)]
    runner = models[0]._engine.runner
    assert isinstance(runner.head.matrices[0], QuantizedMatrix)
    assert isinstance(runner.embedding.matrices[0], np.ndarray)
    found = [model.generate("text", max_new_tokens=24, stop_token_ids=[]).token_ids for model in models]
    assert found[0] == found[1]
    auto = losart.load(tied, "cpu")._engine.runner
    assert auto.head is auto.embedding
