"""GPTQ against its formulas in float64, and the layers that it is run on against the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv import steady
from passes import block_batch
from safetensors.numpy import load_file, save_file

import losart
from losart.config.options import generation_config
from losart.config.precision import BFLOAT16
from losart.engine.batch import PassKind
from losart.errors import DataError, NumericalError, OptionError, TensorError
from losart.eval import EvalConfig
from losart.eval.divergence import measure_divergence
from losart.loaders import open_checkpoint
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import WeightFormat, quantize_checkpoint
from losart.quantization.calibration import Calibration, calibration_ids
from losart.quantization.gptq import DAMPING, gptq
from losart.quantization.rounding import decoded, nearest_codes, outermost_scales, rounded_tensors

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "head_dim": 32, "dtype": "bfloat16"}
FORMATS = [
    WeightFormat("int4", 16),
    WeightFormat("int4", 192),
    WeightFormat("int4", 64),
    WeightFormat("int8"),
    WeightFormat("fp8"),
]
TEXT = "The code of the lock is 48213, and the otter guards it. " * 80


def inputs(rng, columns, rank):
    mixed = rng.standard_normal((400, rank)) @ rng.standard_normal((rank, columns))
    return mixed + 0.3 * rng.standard_normal((400, columns))


def by_the_formulas(weights, hessian, format):
    """Equations 2 and 3 of the paper, one column after the other, in float64."""
    left = weights.astype(np.float64)
    inverse = np.linalg.inv(hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian)))
    group, scales, found = format.group or weights.shape[1], [], np.empty_like(left)
    for column in range(weights.shape[1]):
        if column % group == 0:
            of_group = left[:, None, column : column + group].astype(np.float32)
            scales.append(outermost_scales(of_group, format.name, BFLOAT16)[:, 0].astype(np.float64))
        scaled = (left[:, column] / scales[-1]).astype(np.float32)
        found[:, column] = decoded(nearest_codes(scaled, format.name), format.name) * scales[-1]
        error = (left[:, column] - found[:, column]) / inverse[column, column]
        left[:, column:] -= np.outer(error, inverse[column, column:])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1  # of a column that is done
    return found


def matrix(codes, scales, format):
    wide = decoded(codes, format.name).reshape(*scales.shape, -1) * scales[:, :, None]
    return wide.reshape(codes.shape)


@steady(30)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.sampled_from([192, 384, 576]), st.integers(1, 30))
def test_codes_are_those_of_the_formulas(format, rows, columns, rank):
    rng = np.random.default_rng(rows + columns + rank)
    weights, x = rng.standard_normal((rows, columns), np.float32), inputs(rng, columns, rank)
    found = matrix(*gptq(weights, x.T @ x, format, BFLOAT16), format)
    expected = by_the_formulas(weights, x.T @ x, format)
    # Where float32 rounds to another code, the columns after it make up for that.
    losses = [np.square((one - weights) @ x.T).sum() for one in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert (np.abs(found - expected) < 1e-6).mean() > 0.9


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_errors_are_smaller_than_those_of_rounding(format):
    rng = np.random.default_rng(0)
    weights, x = rng.standard_normal((50, 192), np.float32), inputs(rng, 192, 20)
    groups = weights.reshape(50, -1, format.group or 192)
    scales = outermost_scales(groups, format.name, BFLOAT16)
    codes = nearest_codes((groups / scales[:, :, None]).reshape(weights.shape), format.name)
    rounded = matrix(codes, scales, format)
    found = matrix(*gptq(weights, x.T @ x, format, BFLOAT16), format)
    losses = [np.square((one - weights) @ x.T).sum() for one in (found, rounded)]
    assert losses[0] < 0.6 * losses[1]
    # Columns that have nothing in common: each is rounded for itself.
    alone = gptq(weights, 3.0 * np.eye(192), format, BFLOAT16)
    np.testing.assert_array_equal(alone[0], codes)
    np.testing.assert_array_equal(alone[1], scales)


def test_inputs_that_are_degenerate():
    weights = np.random.default_rng(0).standard_normal((20, 64), np.float32)
    hessian = np.zeros((64, 64))
    hessian[:32, :32] = 1.0  # of rank 1, and nothing comes through half of the columns
    codes, scales = gptq(weights, hessian, WeightFormat("int4", 64), BFLOAT16)
    assert np.isfinite(scales).all() and (codes[:, 32:] == 0).all() and (codes[:, :32] != 0).any()
    codes, _ = gptq(weights, np.zeros((64, 64)), WeightFormat("int8"), BFLOAT16)
    assert not codes.any()
    hessian[3, 3] = np.nan
    with pytest.raises(NumericalError, match="not finite"):
        gptq(weights, hessian, WeightFormat("int8"), BFLOAT16)


@pytest.mark.parametrize("layer", [0, 1])
def test_weights_that_are_not_finite(tmp_path, layer):
    source, text = (
        write_checkpoint(tmp_path / "source", **SIZES | {"dtype": "float32"}),
        tmp_path / "text.txt",
    )
    text.write_text(TEXT)
    tensors, name = load_file(source / "model.safetensors"), f"model.layers.{layer}.mlp.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.inf
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        TensorError, match=rf"model.safetensors: tensor '{name}' has values that are not finite"
    ):
        quantize_checkpoint(
            open_checkpoint(source), tmp_path / "new", WeightFormat("int4", 64), calibration=text
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", **SIZES)


@pytest.mark.parametrize("format", [WeightFormat("int4", 32), WeightFormat("fp8")], ids=str)
def test_layers_get_what_they_get_in_the_whole_model(checkpoint, tmp_path, format):
    source = open_checkpoint(checkpoint)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    ids = calibration_ids(source, text)[:1500]
    calibration = Calibration(source, ids, format)
    assert calibration._ids.shape == (1, 1024) and np.array_equal(calibration._ids[0], ids[:1024])
    assert 0.4 < calibration._masked.mean() < 0.65 and calibration._masked.any(axis=2).all()
    codes = {name: tensor.rows(0, tensor.shape[0]) for name, tensor in calibration.tensors().items()}
    quantize_checkpoint(source, tmp_path / "new", format, calibration=text)
    # What is loaded sees the whole text; calibration has seen the same beginning of it.
    runner = losart.load(tmp_path / "new", "cpu")._engine.runner
    written = open_checkpoint(tmp_path / "new").tensors
    assert len(codes) == 14 and all(written[name].dtype == codes_dtype(format) for name in codes)
    again = Calibration(source, calibration_ids(source, text), format)
    for name, tensor in again.tensors().items():
        np.testing.assert_array_equal(
            tensor.float32(0, tensor.shape[0]), written[name].float32(0, tensor.shape[0])
        )
    options, (masked, length) = generation_config(source.config, {}), (again._masked, 4)
    for number, start in ((0, 0), (1, 512)):
        cache = runner.new_cache(options, 1024)
        cache.reserve(1024)
        if start:
            prompt = again._ids[number, :start]
            runner.forward(block_batch(cache, start, PassKind.PREFILL, ids=prompt, options=options))
            cache.advance(start)
        rows = slice(start, start + length)
        of_block = masked[number, start // length]
        block = np.where(of_block, source.config.mask_token_id, again._ids[number, rows])
        batch = block_batch(
            cache, length, PassKind.FIRST, ids=block, masked=np.flatnonzero(of_block), options=options
        )
        batch.sequences[0].keeps_logits = True
        logits = runner.forward(batch).proposals.logits
        backend = runner.backend
        _, hidden = backend.add_rms_norm(again._noisy[number, rows][of_block], None, runner.final_norm)
        expected = backend.linear(hidden, runner.head)
        expected[:, source.config.mask_token_id] = -np.inf
        np.testing.assert_allclose(logits, expected, rtol=2e-2, atol=2e-2)


def codes_dtype(format: WeightFormat) -> str:
    return {"fp8": "float8"}.get(format.name, format.name)


@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2_moe"])
def test_a_calibrated_model_is_nearer(tmp_path, family):
    checkpoint = write_checkpoint(tmp_path / "source", family=family, **SIZES)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    source, format = open_checkpoint(checkpoint), WeightFormat("int4", 64)
    told = []
    quantize_checkpoint(source, tmp_path / "rounded", format)
    quantize_checkpoint(source, tmp_path / "calibrated", format, None, lambda *ends: told.append(ends), text)
    assert told[-1][0] == told[-1][1]
    reference = losart.load(checkpoint, "cpu")
    options = {"max_new_tokens": 16, "block_length": 4, "stop_token_ids": []}
    config = EvalConfig(("key",), (512,), ("dense",), samples=4, options=options)
    rounded, calibrated = (
        measure_divergence(reference, losart.load(tmp_path / name, "cpu"), config, text=text)[0].mean
        for name in ("rounded", "calibrated")
    )
    assert calibrated < 0.8 * rounded


def test_experts_that_few_tokens_go_to_are_rounded_to_nearest(tmp_path):
    experts = {"num_experts": 32, "num_experts_per_tok": 2}
    path, text = tmp_path / "source", tmp_path / "text.txt"
    source = open_checkpoint(write_checkpoint(path, family="sdar_moe", extra_config=experts, **SIZES))
    text.write_text(TEXT)
    format, ids = WeightFormat("int4", 64), calibration_ids(source, text)[:1024]
    calibration = Calibration(source, ids, format)
    tensors, rounded = calibration.tensors(), rounded_tensors(source, source.tensors, format, None)
    same = {
        name: np.array_equal(tensor.rows(0, tensor.shape[0])[0], rounded[name].rows(0, tensor.shape[0])[0])
        for name, tensor in tensors.items()
    }
    assert calibration.matrices == len(tensors) == 2 * (4 + 3 * 32)
    assert not any(name.endswith("router") for name in tensors)
    assert 0 < calibration.nearest == sum(same.values()) < 2 * 3 * 32
    assert all(".experts." in name for name, is_same in same.items() if is_same)
    of_experts: dict[str, set[bool]] = {}
    for name, is_same in same.items():
        of_experts.setdefault(name.rpartition(".")[0] if ".experts." in name else name, set()).add(is_same)
    assert all(len(found) == 1 for found in of_experts.values())
    text.write_text(TEXT[:1100])
    with pytest.warns(UserWarning, match=r"^[1-9]\d* of 200 matrices are rounded to nearest"):
        quantize_checkpoint(source, tmp_path / "new", format, calibration=text)


def test_a_text_shorter_than_a_block(tmp_path):
    source = open_checkpoint(write_checkpoint(tmp_path / "source", block_length=512, **SIZES))
    with pytest.raises(DataError, match="the text has 300 tokens, and a block 512"):
        Calibration(source, [1] * 300, WeightFormat("int8"))
    assert Calibration(source, [1] * 1600, WeightFormat("int8"))._ids.shape == (1, 1024)


def test_texts(checkpoint, tmp_path):
    source, file = open_checkpoint(checkpoint), tmp_path / "text.txt"
    file.write_text("ä" * 40000)  # the first piece may end within a character
    assert len(calibration_ids(source, file)) == 16384
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"text.txt: has 0 tokens; calibration needs 256 or more"):
        calibration_ids(source, file)
    file.write_bytes(b"a" * 1000 + b"\xff")
    with pytest.raises(DataError, match=r"text.txt: is no text in UTF-8"):
        calibration_ids(source, file)
    plain = write_checkpoint(tmp_path / "plain", tokenizer=False, **SIZES)
    with pytest.raises(OptionError, match="has no tokenizer"):
        calibration_ids(open_checkpoint(plain), file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "source", "text.txt"]
