"""Matrices on their way to a GPU, piece by piece; needs none."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import products, write_adapter
from gguf_files import parts_of, write_gguf
from quantized import compressed, gptq, quantize_checkpoint

pytest.importorskip("cupy", reason="the CUDA backend needs CuPy")

from losart.backends.cpu.convert import float32_of, narrow, widen
from losart.backends.cuda.quantized import quantized_form
from losart.backends.cuda.weights import WeightLoader, rows_to_pack
from losart.config.precision import DTYPES, FORMATS
from losart.loaders import QuantizedTensor, open_checkpoint
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import loaded_tensors


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("saved", [*DTYPES, "int4"])
@pytest.mark.parametrize("size", [64, 100, 1000, 1 << 20])
def test_pieces_are_the_matrix_as_it_is_held(tmp_path, saved, held, size):
    directory = write_checkpoint(
        tmp_path, hidden_size=64, num_layers=1, head_dim=32, dtype=saved if saved in DTYPES else "float32"
    )
    if saved == "int4":
        weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}

        def write(rng, rows, columns):
            return compressed(rng, rows, columns, format="pack-quantized", dtype="int4", block=(1, 32))

        quantize_checkpoint(directory, config, write)
    loader = WeightLoader.__new__(WeightLoader)  # without a device there is no memory for it to stage in
    loader._format = FORMATS[held]
    for name in ("layers.0.q", "layers.0.down"):
        tensor = open_checkpoint(directory).tensors[name]
        rows = tensor.shape[0]
        values = tensor.float32(0, rows) if isinstance(tensor, QuantizedTensor) else widen(tensor.array())
        pieces = list(loader._pieces(tensor, max(size, tensor.shape[1])))
        assert all(piece.ndim == 1 and piece.size <= max(size, tensor.shape[1]) for piece in pieces)
        np.testing.assert_array_equal(np.concatenate(pieces), narrow(values, FORMATS[held]).reshape(-1))


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("merge", ["dtype", "codes"])
def test_pieces_of_a_gguf_file_with_an_adapter(tmp_path, kind, merge, held):
    """Each number is rounded once."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_layers": 1, "head_dim": 64}
    base = write_checkpoint(tmp_path / "base", **sizes, family="stable_diffcoder")
    file = write_gguf(tmp_path / "x.gguf", *parts_of(base, "stable_diffcoder", kind))
    adapter = write_adapter(tmp_path / "adapter", products(base, {"q_proj": 4, "down_proj": 4}, std=0.02))
    tensors = loaded_tensors(open_checkpoint(file, adapter), "auto", "cuda", merge)
    loader = WeightLoader.__new__(WeightLoader)
    loader._format = FORMATS[held]
    for name in ("embed", "layers.0.q", "layers.0.k", "layers.0.down"):
        tensor = tensors[name]
        values = narrow(float32_of(tensor, 0, tensor.shape[0]), FORMATS[held]).reshape(-1)
        pieces = list(loader._pieces(tensor, 1000))
        np.testing.assert_array_equal(np.concatenate(pieces), values)
        # Zeros that are no integers would be rounded on a GPU.
        assert quantized_form((tensor,), FORMATS["float16"]) is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_are_packed_have_zeros_where_the_matrix_is_held_with_some(tmp_path, bits, symmetric):
    """Symmetric GPTQ has zeros in its files, which are all 0."""
    directory = write_checkpoint(tmp_path, hidden_size=128, intermediate_size=256, num_layers=1)
    sizes = {"bits": bits, "group": 128}

    def write(rng, rows, columns):
        return gptq(rng, rows, columns, version=1, shuffled=False, symmetric=symmetric, **sizes)

    quantize_checkpoint(directory, {"quant_method": "gptq", "bits": bits, "group_size": 128}, write)
    tensor = open_checkpoint(directory).tensors["layers.0.down"]
    form = quantized_form((tensor,), FORMATS["float16"])
    assert form is not None and form.zeros != symmetric
    codes, scales, zeros = rows_to_pack(form, tensor, 16, 80)
    assert codes.dtype == np.int8 and (zeros is None) == symmetric
    values = codes.astype(np.float32) - (0 if zeros is None else zeros.repeat(128, axis=1))
    np.testing.assert_array_equal(values * scales.repeat(128, axis=1), tensor.float32(16, 80))
