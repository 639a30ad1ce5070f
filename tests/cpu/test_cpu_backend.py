"""Products of the CPU backend, and what they ask of the machine's threads."""

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from kept_logits import kept_logits
from kv import held, model_config, narrow

import losart
from losart.backends.base import ExpertWeights
from losart.backends.cpu import layer_kernels
from losart.backends.cpu.backend import CpuBackend, Weight
from losart.backends.cpu.quantized_linear import QuantizedMatrix
from losart.backends.cpu.routing import route
from losart.config.model import ExpertsConfig
from losart.config.precision import FORMATS, KV_FORMATS, Precision
from losart.engine.batch import PassKind


def largest_error() -> float:
    """Of products of few and of many tokens, in units of what rounding may cost."""
    rng, worst = np.random.default_rng(0), 0.0
    for dtype in ("float32", "bfloat16", "float16"):
        backend = CpuBackend(model_config(1, 1, 16), Precision.of(dtype))
        for rows, inner in ((1, 1), (5, 15), (49, 16), (97, 100), (130, 264)):
            weight = rng.standard_normal((rows, inner), np.float32)
            matrix = Weight((narrow(weight, dtype), narrow(weight[: rows // 2], dtype)), FORMATS[dtype])
            exact = np.concatenate([held(weight, dtype), held(weight[: rows // 2], dtype)]).astype(np.float64)
            for tokens in (*range(1, 10), 16, 17, 64, 65, 130):
                x = rng.standard_normal((tokens, inner), np.float32)
                scale = np.abs(x.astype(np.float64)) @ np.abs(exact).T
                error = np.abs(backend.linear(x, matrix) - x.astype(np.float64) @ exact.T) / scale
                worst = max(worst, error.max() / (inner * 2.0**-24))
    return worst


@pytest.mark.parametrize("level", ["0", "1", "2"])  # kinds of vectors
def test_products_are_those_of_float64(level):
    script = "import test_cpu_backend as t; print(t.largest_error())"
    environment = os.environ | {"LOSART_SIMD": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert float(result.stdout) <= 1


def test_a_token_s_product_does_not_depend_on_how_many_there_are():
    rng = np.random.default_rng(1)
    backend = CpuBackend(model_config(1, 1, 16), Precision.of("bfloat16"))
    x, weight = rng.standard_normal((8, 300), np.float32), rng.standard_normal((70, 300), np.float32)
    matrix = Weight((narrow(weight, "bfloat16"),), FORMATS["bfloat16"])
    for first, last in itertools.combinations(range(9), 2):
        np.testing.assert_array_equal(
            backend.linear(x[first:last], matrix), backend.linear(x, matrix)[first:last]
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nor_does_that_of_many(dtype):
    rng = np.random.default_rng(2)
    backend = CpuBackend(model_config(1, 1, 16), Precision.of(dtype))
    x, weight = rng.standard_normal((150, 300), np.float32), rng.standard_normal((70, 300), np.float32)
    matrix = Weight((narrow(weight, dtype),), FORMATS[dtype])
    expected = backend.linear(x, matrix)
    for first, last in ((0, 9), (1, 17), (60, 70), (0, 64), (64, 129), (3, 150)):
        np.testing.assert_array_equal(backend.linear(x[first:last], matrix), expected[first:last])


class HoldingBackend(CpuBackend):
    """Holds keys and values in float32, as the numbers that codes of 8 bits would stand for."""

    codes = ""

    def write_kv(self, layer, k, v, batch):
        super().write_kv(layer, *(held(x, self.codes).astype(np.float32) for x in (k, v)), batch)


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize(
    "attention", [{}, {"attention": "losa"}, {"attention": "quest"}, {"attention": "sparsed"}], ids=str
)
def test_logits_with_codes_are_those_of_the_numbers_that_they_stand_for(tiny_checkpoint, kv, attention):
    """Bit by bit, and they are not those of keys and values that nothing has rounded."""
    model = losart.load(tiny_checkpoint, "cpu", "float32")
    prompt = np.random.default_rng(0).integers(0, 300, 611).tolist()
    coded, holding, plain = (
        kind(model.config, Precision.of("float32", format))
        for kind, format in ((CpuBackend, kv), (HoldingBackend, "auto"), (CpuBackend, "auto"))
    )
    holding.codes = kv
    found, logits = [], []
    for backend in (coded, holding, plain):
        model._engine.runner.backend = backend
        options = {"max_new_tokens": 24, "stop_token_ids": [], "budget": 64, **attention}
        with kept_logits(model._engine.runner) as seen:
            found.append(model.generate(prompt, **options).token_ids)
        logits.append([one.logits for one in seen])
    assert found[0] == found[1] and len(logits[0]) == len(logits[1])
    for one, other in zip(*logits[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert (logits[0][0] != logits[2][0]).any()


def random_weight(rng, rows: int, inner: int, form: str) -> Weight:
    """Two matrices, joined; of 4 or 8 bits, or one of them."""
    parts = []
    for quantized in (form.startswith("int"), form == "int8"):
        if quantized:
            matrix = QuantizedMatrix(rows // 2, inner, int(form[3:]), 32, False)
            codes = rng.integers(-8, 8, (rows // 2, inner))
            matrix.fill(0, codes, rng.uniform(0.01, 0.02, (rows // 2, -(-inner // 32))).astype(np.float32))
            parts.append(matrix)
        else:
            parts.append(narrow(rng.standard_normal((rows // 2, inner), np.float32) / 8, "bfloat16"))
    return Weight(tuple(parts), FORMATS["bfloat16"])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", [PassKind.LATER, PassKind.PREFILL])
@pytest.mark.parametrize("form", ["bfloat16", "int4", "int8"])
def test_experts_give_what_each_gives_by_itself(form, kind, deterministic):
    rng, hidden, width = np.random.default_rng(3), 96, 64
    mixture = ExpertsConfig(12, per_token=3, intermediate_size=width, shared=1)
    config, precision = model_config(1, 1, 16), Precision.of("bfloat16")
    backend, few = CpuBackend(config, precision, deterministic), CpuBackend(config, precision, True).linear
    gate_up, down = (
        tuple(random_weight(rng, rows, inner, form) for _ in range(13))
        for rows, inner in ((2 * width, hidden), (hidden, width))
    )
    layer = ExpertWeights(mixture, random_weight(rng, 12, hidden, "bfloat16"), None, gate_up, down)
    prefill = kind is PassKind.PREFILL
    of_all, of_expert = (backend.prefill_linear,) * 2 if prefill else (backend.linear, few)
    for tokens in (1, 4, 9, 40):
        x = rng.standard_normal((tokens, hidden), np.float32)
        chosen, weights = route(of_all(x, layer.router), None, mixture)
        expected = np.zeros_like(x)
        for expert in range(13):
            linear = of_all if expert == 12 else of_expert
            rows, place = (np.arange(tokens), None) if expert == 12 else np.nonzero(chosen == expert)
            if len(rows):
                y = linear(layer_kernels.gated(linear(x[rows], gate_up[expert])), down[expert])
                expected[rows] += y if place is None else weights[rows, place, None] * y
        np.testing.assert_array_equal(backend.experts(x, layer, SimpleNamespace(kind=kind)), expected)
