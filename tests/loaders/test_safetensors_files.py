from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from losart.errors import CheckpointError, LosartError, TensorError
from losart.loaders.safetensors_files import INDEX_FILE, map_file, map_tensors


def raw_file(path: Path, header: dict, data: bytes, pad: int = 0) -> Path:
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def two_files(tmp_path):
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(4, np.float32)}, tmp_path / "two.safetensors")
    return tmp_path


def test_values_are_those_that_were_saved(tmp_path):
    values = {
        "f32": np.arange(12, dtype=np.float32).reshape(3, 4),
        "f16": np.linspace(-1, 1, 5, dtype=np.float16),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    save_file(values, tmp_path / "model.safetensors")
    tensors = map_tensors(tmp_path)
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(tensors[name].array(), value)
        assert tensors[name].array().dtype == value.dtype
        assert tensors[name].shape == value.shape
    assert tensors["f16"].dtype == "float16"


def test_bfloat16_comes_as_bits(tmp_path):
    bits = np.array([0x3F80, 0xC000, 0x7F80], np.uint16)
    entry = {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}
    tensor = map_file(raw_file(tmp_path / "x", {"a": entry}, bits.tobytes()))["a"]
    assert tensor.dtype == "bfloat16"
    assert tensor.array().dtype == np.uint16
    np.testing.assert_array_equal(tensor.array(), bits)


def test_arrays_share_the_mapping_and_cannot_be_written(tmp_path):
    save_file({"a": np.ones(1000, np.float32)}, tmp_path / "model.safetensors")
    tensor = map_tensors(tmp_path)["a"]
    assert np.shares_memory(tensor.array(), tensor.array())
    with pytest.raises(ValueError, match="read-only"):
        tensor.array()[0] = 1


def test_misaligned_tensors_are_copied(tmp_path):
    value = np.arange(5, dtype=np.float32)
    entry = {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}
    text = json.dumps({"a": entry})
    path = raw_file(tmp_path / "x", {"a": entry}, value.tobytes(), pad=1 + (-len(text)) % 4)
    array = map_file(path)["a"].array()
    assert array.flags.aligned and not array.flags.writeable
    np.testing.assert_array_equal(array, value)


def test_arrays_may_be_read_after_release(tmp_path):
    value = np.arange(100_000, dtype=np.float32)
    save_file({"a": value, "b": value + 1}, tmp_path / "model.safetensors")
    tensors = map_tensors(tmp_path)
    array = tensors["a"].array()
    for tensor in tensors.values():
        tensor.release()
    np.testing.assert_array_equal(array, value)
    np.testing.assert_array_equal(tensors["b"].array(), value + 1)


def test_a_dtype_without_support_is_named(tmp_path):
    save_file({"a": np.zeros(3, np.int64)}, tmp_path / "model.safetensors")
    tensor = map_tensors(tmp_path)["a"]
    with pytest.raises(TensorError, match=r"model\.safetensors.*'a'.*int64"):
        tensor.array()


def test_index_joins_files(two_files):
    write_index(two_files, {"a": "one.safetensors", "b": "two.safetensors"})
    tensors = map_tensors(two_files)
    assert {name: tensor.file.name for name, tensor in tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_links_out_of_the_directory_are_followed(two_files, tmp_path_factory):
    blob = tmp_path_factory.mktemp("blobs") / "0123abcd"
    (two_files / "one.safetensors").rename(blob)
    (two_files / "one.safetensors").symlink_to(blob)
    write_index(two_files, {"a": "one.safetensors"})
    assert map_tensors(two_files)["a"].array().sum() == 0


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "x/../../y", "C:\\x", "..\\x", "", ".", 3, None, "a\0b"]
)
def test_index_may_not_point_outside(two_files, name):
    write_index(two_files, {"a": name})
    with pytest.raises(CheckpointError, match=r"index\.json: tensor 'a'.*not a file of this directory"):
        map_tensors(two_files)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_index_needs_a_weight_map(two_files, weight_map):
    write_index(two_files, weight_map)
    with pytest.raises(CheckpointError, match="weight_map must be"):
        map_tensors(two_files)


def test_index_of_a_missing_file(two_files):
    write_index(two_files, {"a": "three.safetensors"})
    with pytest.raises(CheckpointError, match=r"three\.safetensors: no such file"):
        map_tensors(two_files)


def test_tensor_of_the_index_that_is_not_in_its_file(two_files):
    write_index(two_files, {"a": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(TensorError, match=r"one\.safetensors: tensor 'c' is missing"):
        map_tensors(two_files)


def test_tensor_of_the_index_that_is_in_another_file(two_files):
    write_index(two_files, {"a": "one.safetensors", "b": "one.safetensors", "x": "two.safetensors"})
    with pytest.raises(TensorError, match=r"one\.safetensors: tensor 'b' is missing"):
        map_tensors(two_files)


def test_tensor_in_two_files(two_files):
    save_file({"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, two_files / "two.safetensors")
    write_index(two_files, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(TensorError, match=r"'a' is both in .*one\.safetensors and in .*two\.safetensors"):
        map_tensors(two_files)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        ("pytorch_model.bin", "only safetensors"),
        ("pytorch_model.bin.index.json", "only safetensors"),
        ("model-00001-of-00002.safetensors", r"index\.json, which is missing"),
    ],
)
def test_directories_without_weights(tmp_path, file, message):
    if file:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        map_tensors(tmp_path)


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        map_tensors(tmp_path)


GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@pytest.mark.parametrize(
    ("change", "data_size"),
    [
        ({}, 31),
        ({}, 33),
        ({"a": GOOD["a"] | {"shape": [2, 4]}}, 32),
        ({"a": GOOD["a"] | {"shape": [-2, -3]}}, 32),
        ({"a": GOOD["a"] | {"data_offsets": [24, 0]}}, 32),
        ({"a": GOOD["a"] | {"data_offsets": [8, 32]}}, 32),
        ({"a": GOOD["a"] | {"dtype": "F33"}}, 32),
        ({"a": {"dtype": "F32"}}, 32),
        ({"a": None}, 32),
        ({"a": GOOD["a"] | {"data_offsets": [0, 2**70]}}, 32),
    ],
)
def test_unsound_headers(tmp_path, change, data_size):
    path = raw_file(tmp_path / "x.safetensors", GOOD | change, bytes(data_size))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a sound safetensors file"):
        map_file(path)


@pytest.mark.parametrize("content", [b"", b"abc", bytes(8), b"\xff" * 64, (2**40).to_bytes(8, "little")])
def test_files_that_are_no_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        map_file(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_give_an_error_or_load(data):
    with tempfile.TemporaryDirectory() as folder:
        path = raw_file(Path(folder, "x.safetensors"), GOOD, bytes(range(32)))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 33))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        try:
            tensors = map_file(path)
        except LosartError as error:
            assert "x.safetensors" in str(error)
            return
        for tensor in tensors.values():
            try:
                assert tensor.array().shape == tensor.shape
                tensor.array().tobytes()
            except TensorError:
                assert tensor.dtype not in ("float32", "bfloat16", "float16")
            tensor.release()
