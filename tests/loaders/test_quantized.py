"""Quantized checkpoints stand for the matrices that were written, and unsound ones are refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import (
    awq,
    compressed,
    float8_value,
    fp8,
    gptq,
    quantize_checkpoint,
    save_tensors,
    with_plain_weights,
)
from safetensors.numpy import load_file, save_file

import losart
from losart.backends.cpu.quantized_linear import QuantizedMatrix
from losart.errors import CheckpointError, ConfigError, LosartError, TensorError
from losart.loaders import open_checkpoint
from losart.loaders.quantized import METHODS
from losart.loaders.quantized.float8 import FLOAT8_VALUES
from losart.measure.inspection import inspection
from losart.measure.random_checkpoint import write_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "head_dim": 32}


def compressed_config(format: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def weights_of(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **more}


PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {}},
        partial(gptq, bits=4, group=32, version=1, shuffled=False),
    ),
    "gptq, 8 bits, one group": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True},
        partial(gptq, bits=8, group=-1, version=1, shuffled=False),
    ),
    "gptq, symmetric": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
        partial(gptq, bits=4, group=32, version=1, shuffled=False, symmetric=True),
    ),
    "gptq, version 2, shuffled": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "desc_act": True,
            "checkpoint_format": "gptq_v2",
        },
        partial(gptq, bits=4, group=32, version=2, shuffled=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, partial(awq, group=32)),
    "packed 4, groups": (
        compressed_config(PACKED, weights_of(4, "group", group_size=32)),
        partial(compressed, format=PACKED, dtype="int4", block=(1, 32)),
    ),
    "packed 4, groups, zeros": (
        compressed_config(PACKED, weights_of(4, "group", group_size=16, symmetric=False)),
        partial(compressed, format=PACKED, dtype="int4", block=(1, 16), symmetric=False),
    ),
    "packed 4, shuffled": (
        compressed_config(PACKED, weights_of(4, "group", group_size=32, actorder="group")),
        partial(compressed, format=PACKED, dtype="int4", block=(1, 32), shuffled=True),
    ),
    "packed 8, channels, zeros": (
        compressed_config(PACKED, weights_of(8, "channel", symmetric=False)),
        partial(compressed, format=PACKED, dtype="int8", block=(1, 0), symmetric=False, scales="F32"),
    ),
    "packed 4, one scale and zero": (
        compressed_config(PACKED, weights_of(4, "tensor", symmetric=False)),
        partial(compressed, format=PACKED, dtype="int4", block=(0, 0), symmetric=False),
    ),
    "int 8, channels": (
        compressed_config(INT, weights_of(8, "channel")),
        partial(compressed, format=INT, dtype="int8", block=(1, 0)),
    ),
    "int 8, groups, zeros": (
        compressed_config(INT, weights_of(8, "group", group_size=16, symmetric=False)),
        partial(compressed, format=INT, dtype="int8", block=(1, 16), symmetric=False, scales="F16"),
    ),
    "float 8, one scale": (
        compressed_config(FLOAT, weights_of(8, "tensor", type="float")),
        partial(compressed, format=FLOAT, dtype="float8", block=(0, 0)),
    ),
    "float 8, channels": (
        compressed_config(FLOAT, weights_of(8, "channel", type="float")),
        partial(compressed, format=FLOAT, dtype="float8", block=(1, 0)),
    ),
    "float 8, blocks": (
        compressed_config(FLOAT, weights_of(8, "block", type="float", block_structure=[24, 40])),
        partial(compressed, format=FLOAT, dtype="float8", block=(24, 40)),
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 48]}, partial(fp8, block=(32, 48))),
    "fp8, one scale": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        partial(fp8, block=(0, 0), end="weight_scale", axes=0),
    ),
    "fp8, rows": ({"quant_method": "fp8"}, partial(fp8, block=(1, 0), end="weight_scale", axes=1)),
    "fp8, one scale, two axes": ({"quant_method": "fp8"}, partial(fp8, block=(0, 0))),
    "fp8, rows, two axes": (
        {"quant_method": "fp8", "weight_block_size": None},
        partial(fp8, block=(1, 0), end="weight_scale"),
    ),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    config, write = CASES[request.param]
    directory = write_checkpoint(tmp_path / "checkpoint", **SIZES)
    return directory, quantize_checkpoint(directory, config, write)


def test_rows_are_those_that_were_written(case):
    directory, matrices = case
    tensors = open_checkpoint(directory).tensors
    quantized = {tensor.name: tensor for tensor in tensors.values() if tensor.name in matrices}
    assert quantized.keys() == matrices.keys() and len(matrices) == 14
    for name, expected in matrices.items():
        tensor = quantized[name]
        assert tensor.shape == expected.shape and tensor.dtype in ("int4", "int8", "float8")
        for start, stop in ((0, len(expected)), (0, 1), (5, 21), (len(expected) - 3, len(expected))):
            np.testing.assert_array_equal(tensor.float32(start, stop), expected[start:stop])
            tensor.release()


def test_a_generation_is_that_of_the_matrices(case, tmp_path):
    directory, matrices = case
    plain = write_checkpoint(tmp_path / "plain", **SIZES)
    save_file(load_file(plain / "model.safetensors") | matrices, plain / "model.safetensors")
    options: dict[str, Any] = {"max_new_tokens": 12, "stop_token_ids": []}
    models = losart.load(directory, "cpu"), losart.load(plain, "cpu")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    text = json.dumps(config)
    stays = not any(word in text for word in ("desc_act", "actorder", '"float"', "fp8"))
    for layer in models[0]._engine.runner.layers:
        for weight in (layer.qkv, layer.o, layer.feed_forward.gate_up, layer.feed_forward.down):
            assert all(isinstance(matrix, QuantizedMatrix) == stays for matrix in weight.matrices)
    held = inspection(open_checkpoint(directory), "cpu")["matrix_bytes"]
    assert len(held) == 1 + stays and next(iter(held)) == "float32"
    models = with_plain_weights(models[0]), models[1]
    found, expected = (model.generate(list(range(40)), **options).token_ids for model in models)
    assert found == expected


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_models_are_told_apart_by_their_codes_and_scales(case, part):
    directory, _ = case

    def edit(tensors: Any) -> None:
        names = (name for name in tensors if name.startswith(f"{MODULE}."))
        name = next(name for name in names if ("scale" in name) == (part == "scales"))
        tensors[name][1].reshape(-1).view(np.uint8).flat[0] ^= 1

    before = losart.load(directory, "cpu").fingerprint
    assert losart.load(directory, "cpu").fingerprint == before
    assert losart.load(edited(directory, edit), "cpu").fingerprint != before


@given(st.integers(0, 255))
def test_float8(code):
    np.testing.assert_array_equal(FLOAT8_VALUES[code], np.float32(float8_value(code)))


def edited(directory: Path, edit: Any) -> Path:
    """Change the tensors of a checkpoint, given as safetensors' dtype and values."""
    data = (directory / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    names = {"F32": "f4", "BF16": "u2", "F16": "f2", "I32": "i4", "I64": "i8", "I8": "i1", "F8_E4M3": "u1"}
    for name, entry in json.loads(data[8:start]).items():
        first, last = entry["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], names[entry["dtype"]])
        tensors[name] = (entry["dtype"], values.reshape(entry["shape"]).copy())
    edit(tensors)
    save_tensors(directory / "model.safetensors", tensors)
    return directory


def quantized(tmp_path: Path, case: str) -> Path:
    directory = write_checkpoint(tmp_path / "checkpoint", **SIZES)
    quantize_checkpoint(directory, *CASES[case])
    return directory


PARTS = [
    (case, end)
    for case, ends in {
        "gptq": ("scales", "qzeros"),
        "awq": ("scales", "qzeros"),
        "packed 4, groups, zeros": ("weight_packed", "weight_zero_point", "weight_shape"),
        "int 8, groups, zeros": ("weight", "weight_zero_point"),
        "float 8, blocks": ("weight",),
        "fp8": ("weight",),
    }.items()
    for end in ends
]
MODULE = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("case", "end"), PARTS)
def test_a_missing_part_is_named(tmp_path, case, end):
    directory = edited(quantized(tmp_path, case), lambda tensors: tensors.pop(f"{MODULE}.{end}"))
    with pytest.raises(TensorError, match=rf"model.safetensors: tensor '{MODULE}.{end}' is missing"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("case", "end"),
    [
        *PARTS,
        *(
            (case, "weight_scale")
            for case in ("packed 4, groups, zeros", "int 8, channels", "float 8, blocks")
        ),
        ("fp8", "weight_scale_inv"),
        ("gptq", "g_idx"),
        ("gptq", "qweight"),
    ],
)
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_part_of_another_shape_or_dtype_is_named(tmp_path, case, end, change):
    def edit(tensors: Any) -> None:
        dtype, values = tensors[f"{MODULE}.{end}"]
        if change == "shape":
            tensors[f"{MODULE}.{end}"] = dtype, values[:-1].copy()
        else:
            tensors[f"{MODULE}.{end}"] = "U8", np.zeros(values.shape, np.uint8)

    directory = edited(quantized(tmp_path, case), edit)
    with pytest.raises(TensorError, match=rf"tensor '{MODULE}.{end}' has the {change} "):
        open_checkpoint(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("case", ["gptq", "packed 8, channels, zeros", "fp8"])
def test_scales_that_are_not_finite_are_refused(tmp_path, case, value):
    def edit(tensors: Any) -> None:
        name = next(name for name in tensors if name.startswith(f"{MODULE}.") and "scale" in name)
        tensors[name][1].flat[-1] = value

    directory = edited(quantized(tmp_path, case), edit)
    with pytest.raises(TensorError, match=rf"tensor '{MODULE}.*scale.*' has scales that are not finite"):
        losart.load(directory, "cpu")


@pytest.mark.parametrize("value", [-1, 99])
def test_a_group_that_there_is_not_is_refused(tmp_path, value):
    def edit(tensors: Any) -> None:
        tensors[f"{MODULE}.g_idx"][1][3] = value

    directory = edited(quantized(tmp_path, "gptq, version 2, shuffled"), edit)
    with pytest.raises(TensorError, match=rf"tensor '{MODULE}.g_idx' names groups beyond 0 to 1"):
        open_checkpoint(directory)


def test_an_index_full_of_minus_one_is_none(tmp_path):
    def edit(tensors: Any) -> None:
        for name in list(tensors):
            if name.endswith(".g_idx"):
                tensors[name][1][:] = -1

    directory = write_checkpoint(tmp_path / "checkpoint", **SIZES)
    matrices = quantize_checkpoint(directory, *CASES["gptq"])
    tensor = open_checkpoint(edited(directory, edit)).tensors["layers.1.up"]
    np.testing.assert_array_equal(tensor.float32(0, 96), matrices[tensor.name])


def test_another_shape_than_the_files_own_is_refused(tmp_path):
    def edit(tensors: Any) -> None:
        tensors[f"{MODULE}.weight_shape"][1][0] += 1

    directory = edited(quantized(tmp_path, "packed 4, groups"), edit)
    with pytest.raises(TensorError, match="weight_shape' says another shape than"):
        open_checkpoint(directory)


def test_zeros_that_a_symmetric_scheme_saved_are_ignored(tmp_path):
    def edit(tensors: Any) -> None:
        tensors[f"{MODULE}.weight_zero_point"] = "I8", np.zeros((96, 1), np.int8)

    tensor = open_checkpoint(edited(quantized(tmp_path, "int 8, channels"), edit)).tensors["layers.1.up"]
    assert not tensor.has_zeros


def test_what_activations_would_need_is_ignored(tmp_path):
    def edit(tensors: Any) -> None:
        tensors[f"{MODULE}.input_scale"] = "F32", np.ones(1, np.float32)

    open_checkpoint(edited(quantized(tmp_path, "float 8, channels"), edit))
    with pytest.raises(TensorError, match=r"unknown tensors: .*input_scale"):
        open_checkpoint(edited(quantized(tmp_path, "awq"), edit))


def test_groups_of_modules_by_name(tmp_path):
    """A module's own name, then a pattern, is taken before the class of all."""
    directory = write_checkpoint(tmp_path / "checkpoint", **SIZES)
    config = compressed_config(PACKED, weights_of(4, "group", group_size=32))
    eight = {"targets": ["re:.*layers.1.mlp.*"], "weights": weights_of(8, "channel")}
    config["config_groups"]["group_1"] = eight

    def write(rng: Any, rows: int, columns: int) -> Any:
        wide = next(turns)
        kind = {"dtype": "int8", "block": (1, 0)} if wide else {"dtype": "int4", "block": (1, 32)}
        return compressed(rng, rows, columns, format=PACKED, **kind)

    names = [name for name in load_file(directory / "model.safetensors") if name.endswith("_proj.weight")]
    turns = iter(["layers.1.mlp" in name for name in names])
    matrices = quantize_checkpoint(directory, config, write)
    for tensor in open_checkpoint(directory).tensors.values():
        if tensor.name in matrices:
            assert tensor.dtype == ("int8" if "layers.1.mlp" in tensor.name else "int4")
            np.testing.assert_array_equal(tensor.float32(0, tensor.shape[0]), matrices[tensor.name])
    del config["config_groups"]["group_0"]
    keys = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(keys | {"quantization_config": config}))
    with pytest.raises(TensorError, match="of a module that no config_groups of quantization_config name"):
        open_checkpoint(directory)


GROUP = weights_of(4, "group", group_size=32)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "quantization_config must be an object"),
        ({}, "missing key 'quantization_config.quant_method'"),
        ({"quant_method": "hqq"}, f"quant_method 'hqq' is not supported; supported: {', '.join(METHODS)}"),
        ({"quant_method": "gptq"}, "missing key 'quantization_config.bits'"),
        ({"quant_method": "gptq", "bits": 3}, "quantization_config.bits must be 4 or 8, not 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size must be an integer from 1"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format must be one"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"a": {}}}, "dynamic is not supported"),
        (
            compressed_config(PACKED, GROUP) | {"config_groups": {"g": {"targets": ["re:*"]}}},
            "a regular expression",
        ),
        ({"quant_method": "awq", "version": "gemv"}, "version must be 'gemm', not 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "bits must be 4, not 8"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point must be true"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "weight_block_size must be a list of two integers",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt must be 'e4m3'"),
        ({"quant_method": "compressed-tensors"}, "missing key 'quantization_config.config_groups'"),
        (compressed_config("marlin-24", GROUP), "group_0.format must be one of pack-quantized, "),
        (compressed_config("nvfp4-pack-quantized", GROUP), "group_0.format must be one of pack-quantized, "),
        (compressed_config(PACKED, GROUP, transform_config={"a": 1}), "transform_config is not supported"),
        (compressed_config(PACKED, GROUP, sparsity_config={"format": "sparse-24"}), "sparsity_config.format"),
        (compressed_config(PACKED, GROUP, quantization_status="calibration"), "quantization_status must be"),
        (compressed_config(PACKED, GROUP | {"num_bits": 3}), "num_bits must be of a supported int"),
        (compressed_config(FLOAT, GROUP | {"type": "float"}), "num_bits must be of a supported float"),
        (compressed_config(PACKED, GROUP | {"strategy": "token"}), "strategy must be one of tensor, "),
        (compressed_config(PACKED, GROUP | {"group_size": None}), "missing key '.*weights.group_size'"),
        (compressed_config(FLOAT, weights_of(8, "block", type="float")), "block_structure must be a list"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, config, says):
    directory = write_checkpoint(tmp_path / "checkpoint", **SIZES)
    keys = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(keys | {"quantization_config": config}))
    with pytest.raises(ConfigError, match=says) as caught:
        open_checkpoint(directory)
    assert str(directory / "config.json") in str(caught.value)


@settings(deadline=None)
@given(st.data())
def test_a_flipped_byte_is_an_error_of_ours_or_none(tmp_path_factory, data):
    case = data.draw(st.sampled_from(list(CASES)))
    directory = tmp_path_factory.mktemp("flipped")
    write_checkpoint(directory, **SIZES | {"num_layers": 1})
    quantize_checkpoint(directory, *CASES[case])
    content = bytearray((directory / "model.safetensors").read_bytes())
    place = data.draw(st.integers(0, min(len(content), 6000) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (directory / "model.safetensors").write_bytes(content)
    try:
        for tensor in open_checkpoint(directory).tensors.values():
            if hasattr(tensor, "float32"):
                tensor.float32(0, tensor.shape[0])
    except (CheckpointError, TensorError, LosartError):
        pass
