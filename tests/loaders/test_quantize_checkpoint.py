"""Checkpoints that are rounded to codes, and what stands in the new files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from quantized import float8_value
from safetensors.numpy import load_file, save_file

import losart
from losart.errors import CheckpointError, OptionError, TensorError
from losart.loaders import open_checkpoint
from losart.loaders.safetensors_files import map_file
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import WEIGHTS, RoundedTensor, WeightFormat, quantize_checkpoint, writing
from losart.quantization import checkpoint as written

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "head_dim": 32}
FORMATS = [
    WeightFormat("int4", 32),
    WeightFormat("int4"),
    WeightFormat("int8", 16),
    WeightFormat("int8"),
    WeightFormat("fp8"),
]
CODES = {
    "int4": np.arange(-8.0, 8),
    "int8": np.arange(-127.0, 128),
    "fp8": np.array([float8_value(code) for code in range(256) if code & 127 != 127]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", [None, WeightFormat("int8")])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_new_checkpoint_has_the_rounded_matrices(tmp_path, format, head, dtype):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", dtype=dtype, bias=True, **SIZES))
    seen = []
    quantize_checkpoint(
        source, tmp_path / "new", format, head, lambda done, total: seen.append((done, total))
    )
    found = open_checkpoint(tmp_path / "new")
    assert found.config == source.config and found.tensors.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        new = found.tensors[name]
        of_tensor = head if name == "head" else format if name.startswith("layers.") else None
        if of_tensor is None or len(tensor.shape) == 1:
            np.testing.assert_array_equal(new.array(), tensor.array())
        else:
            rounded = RoundedTensor(tensor, of_tensor)
            assert (new.dtype, new.group) == (rounded.dtype, rounded.group)
            np.testing.assert_array_equal(new.float32(0, new.shape[0]), rounded.float32(0, new.shape[0]))
    assert len(seen) == len(source.tensors) and seen[-1][0] == seen[-1][1]
    prompt = list(range(30))
    assert (
        losart.load(tmp_path / "new", "cpu").generate(prompt, max_new_tokens=8, stop_token_ids=[]).token_ids
    )
    others = {file.name for file in (tmp_path / "source").iterdir()}
    assert {file.name for file in (tmp_path / "new").iterdir()} == others
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def rounded_rows(tmp_path: Path, values: np.ndarray, format: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    save_file({"a": values}, tmp_path / "model.safetensors")
    return RoundedTensor(map_file(tmp_path / "model.safetensors")["a"], format).rows(0, len(values))[:2]


ordinary = st.floats(-(2.0**120), 2.0**120, width=32)


@given(
    arrays(np.float32, (2, 16), elements=ordinary),
    st.sampled_from(
        [WeightFormat("int4", 8), WeightFormat("int4"), WeightFormat("int8", 8), WeightFormat("fp8")]
    ),
)
@example(np.zeros((2, 16), np.float32), WeightFormat("int4", 8))
@example(np.full((2, 16), 1e-45, np.float32), WeightFormat("fp8"))
@example(np.full((2, 16), 3e38, np.float32), WeightFormat("int8"))
def test_every_code_is_the_nearest(tmp_path_factory, values, format):
    codes, scales = rounded_rows(tmp_path_factory.mktemp("rounded"), values, format)
    group, known = format.group or 16, CODES[format.name]
    assert scales.shape == (2, 16 // group) and np.isfinite(scales).all() and scales.all()
    for (row, column), value in np.ndenumerate(values):
        scale = np.float64(scales[row, column // group])
        code = float8_value(int(codes[row, column])) if format.name == "fp8" else codes[row, column]
        # What is divided is rounded to float32 once.
        scaled = np.float64(np.float32(np.float32(value) / np.float32(scale)))
        assert abs(code - scaled) == np.abs(known - scaled).min()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_largest_value_keeps_its_size(tmp_path, format):
    values = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    save_file({"a": values}, tmp_path / "model.safetensors")
    tensor = RoundedTensor(map_file(tmp_path / "model.safetensors")["a"], format)
    group = format.group or 64
    most = np.abs(values).reshape(8, -1, group).argmax(axis=2)
    for of in (values, tensor.float32(0, 8)):
        largest = np.take_along_axis(of.reshape(8, -1, group), most[:, :, None], axis=2)
        expected = np.take_along_axis(values.reshape(8, -1, group), most[:, :, None], axis=2)
        np.testing.assert_allclose(largest, expected, rtol=1e-6)


def test_shards(tmp_path, monkeypatch):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", shards=2, **SIZES))
    quantize_checkpoint(source, tmp_path / "one", WeightFormat("int4"))
    monkeypatch.setattr(writing, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(written, "PIECE", 1000)
    quantize_checkpoint(source, tmp_path / "several", WeightFormat("int4"))
    files = sorted(file.name for file in (tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    one = load_file(tmp_path / "one" / "model.safetensors")
    several: dict[str, np.ndarray] = {}
    for file in files:
        several |= load_file(tmp_path / "several" / file)
    assert several.keys() == one.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(several[name], values)
    open_checkpoint(tmp_path / "several")


def test_a_destination_that_exists_is_left(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", **SIZES))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="new: exists"):
        quantize_checkpoint(source, tmp_path / "new", WeightFormat("int8"))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_cut_short_leaves_nothing(tmp_path, monkeypatch, error):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", **SIZES))

    def fail(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise error

    calls = 0
    with pytest.raises(error):
        quantize_checkpoint(source, tmp_path / "new", WeightFormat("int8"), progress=fail)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_what_others_left_is_no_hindrance_and_stays(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", **SIZES))
    (tmp_path / "new.incomplete").mkdir()
    (tmp_path / "new.incomplete" / "old").write_text("")
    quantize_checkpoint(source, tmp_path / "new", WeightFormat("int8"))
    assert {file.name for file in tmp_path.iterdir()} == {"source", "new", "new.incomplete"}
    assert (tmp_path / "new.incomplete" / "old").exists()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "source").stat().st_mode


def test_a_link_to_nowhere_is_one_that_exists(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", **SIZES))
    (tmp_path / "new").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="new: exists"):
        quantize_checkpoint(source, tmp_path / "new", WeightFormat("int8"))


def test_quantized_checkpoints_are_refused(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", **SIZES))
    quantize_checkpoint(source, tmp_path / "new", WeightFormat("int8"))
    with pytest.raises(OptionError, match="new: is quantized; quantize the checkpoint that it was made of"):
        quantize_checkpoint(open_checkpoint(tmp_path / "new"), tmp_path / "newer", WeightFormat("int4"))


def test_a_head_that_is_the_embedding_is_refused(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", tied=True, **SIZES))
    with pytest.raises(OptionError, match="the head is the embedding"):
        quantize_checkpoint(source, tmp_path / "new", WeightFormat("int8"), WeightFormat("int8"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    directory, name = write_checkpoint(tmp_path / "source", **SIZES), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(TensorError, match=f"tensor '{name}' has values that are not finite"):
        quantize_checkpoint(open_checkpoint(directory), tmp_path / "new", WeightFormat("int8"))
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_groups_that_do_not_divide_are_named(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", **SIZES | {"intermediate_size": 104}))
    with pytest.raises(
        OptionError, match=r"groups of 64 do not divide the 104 columns of tensor '.*down_proj"
    ):
        quantize_checkpoint(source, tmp_path / "new", WeightFormat.by_default("int4"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("int3",), f"weights must be one of {', '.join(WEIGHTS)}, not 'int3'"),
        (("int4", 0), "group must be a multiple of 8 above 0, not 0"),
        (("int4", 12), "group must be a multiple of 8 above 0, not 12"),
        (("int8", True), "group must be a multiple of 8"),
        (("fp8", 64), "fp8 has a scale per row, and no groups"),
    ],
)
def test_formats_that_there_are_not(arguments, says):
    with pytest.raises(OptionError, match=says):
        WeightFormat(*arguments)


def test_the_configuration_says_what_was_done(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", **SIZES))
    quantize_checkpoint(source, tmp_path / "new", WeightFormat("int4", 32), WeightFormat("fp8"))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((tmp_path / "source" / "config.json").read_text())
    assert (quantization["format"], quantization["ignore"]) == ("mixed-precision", [])
    groups = quantization["config_groups"]
    assert groups["group_0"]["weights"] | {"num_bits": 4, "strategy": "group"} == groups["group_0"]["weights"]
    assert groups["group_1"]["targets"] == ["re:.*lm_head"]
    shutil.rmtree(tmp_path / "new")
