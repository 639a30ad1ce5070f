"""Mixtures of experts on CUDA: kernels against float64, and whole models against the CPU backend."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from cuda_arrays import matmul_array, on_host
from families import FAMILIES, SMALL
from hypothesis import example, given
from hypothesis import strategies as st
from kv import steady
from quantized import awq, fp8, gptq, quantize_checkpoint, with_plain_weights, with_rounded_embedding
from test_cuda import hidden_states, relative_error
from test_cuda_kernels import DTYPES, TOLERANCE, assert_close, cards, new_backend, to_device, widened
from test_cuda_quantized import FORMS, columns_of, matrix_of, random_codes

import losart
from losart.backends.base import ExpertWeights
from losart.backends.cpu.convert import narrow, widen
from losart.backends.cpu.routing import route
from losart.config.model import ExpertsConfig
from losart.config.precision import FORMATS
from losart.measure.random_checkpoint import write_checkpoint

pytestmark = pytest.mark.gpu


@st.composite
def configs(draw: Any) -> ExpertsConfig:
    groups, size = draw(st.sampled_from([(1, 4), (1, 37), (1, 128), (2, 2), (8, 4), (4, 32), (8, 32)]))
    kept = draw(st.integers(1, groups))
    return ExpertsConfig(
        count=groups * size,
        per_token=draw(st.integers(1, min(8, kept * size))),
        intermediate_size=draw(st.sampled_from([4, 40, 64, 200])),
        scores=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalize=draw(st.booleans()),
        bias=draw(st.booleans()),
        groups=groups,
        kept_groups=kept,
        scaling=draw(st.sampled_from([1.0, 2.5])),
        shared=draw(st.integers(0, 2)),
    )


def logits_of(kind: str, tokens: int, count: int, rng: Any) -> np.ndarray:
    """Router logits that are often equal; `one`: all tokens go to the same experts first."""
    logits = np.round(4 * rng.standard_normal((tokens, count), np.float32)) / 8
    if kind == "one":
        logits[:, rng.permutation(count)[:2]] += 9
    return logits.astype(np.float32)


def as_matmul(backend: Any, values: np.ndarray, rng: Any) -> Any:
    """A matmul of these values as several planes, whose sums are exact."""
    import cupy

    from losart.backends.cuda.results import Matmul

    planes = np.round(8 * rng.standard_normal((int(rng.integers(1, 35)), *values.shape))) / 8
    planes[-1] = values - planes[:-1].sum(axis=0)
    with backend.memory.stream:
        return Matmul(cupy.asarray(planes.astype(np.float32)), None, len(planes))


class Layer:
    """Experts with random weights, on the host as they are rounded and on the device."""

    def __init__(self, backend: Any, dtype: str, config: ExpertsConfig, hidden: int, rng: Any) -> None:
        from losart.backends.cuda.experts import ExpertStack

        every, width = config.count + config.shared, config.intermediate_size
        bias = rng.standard_normal(config.count).astype(np.float32) if config.bias else None
        self.bias = bias

        def drawn(*shape: int) -> tuple[np.ndarray, Any]:
            values = rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
            held = narrow(values, FORMATS[dtype])
            on_device = to_device(backend, values, dtype)
            return widen(held).astype(np.float64), ExpertStack(on_device)

        self.gate_up, gate_up = drawn(every, 2 * width, hidden)
        self.down, down = drawn(every, hidden, width)
        on_device = None if bias is None else to_device(backend, bias)
        self.weights = ExpertWeights(config, None, on_device, gate_up, down)

    def expected(self, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """In float64."""
        config = self.weights.config
        chosen, weights = route(logits, self.bias, config)
        y = np.zeros_like(x)
        for expert in range(config.count + config.shared):
            tokens, slots = np.nonzero(chosen == expert)
            factor = weights[tokens, slots].astype(np.float64)
            if expert >= config.count:
                tokens, factor = np.arange(len(x)), np.ones(len(x))
            gate, up = np.split(x[tokens] @ self.gate_up[expert].T, 2, axis=1)
            y[tokens] += factor[:, None] * (gate / (1 + np.exp(-gate)) * up @ self.down[expert].T)
        return y


class CodedLayer(Layer):
    """Experts with random codes and scales; with zeros widths must be multiples of 128."""

    def __init__(
        self, backend: Any, dtype: str, config: ExpertsConfig, hidden: int, form: Any, rng: Any
    ) -> None:
        every, width = range(config.count + config.shared), config.intermediate_size
        bias = rng.standard_normal(config.count).astype(np.float32) if config.bias else None
        self.bias = bias

        def drawn(rows: int, inner: int) -> Any:
            return random_codes(rng, rows, inner, *form, dtype)

        gate_up = [(drawn(width, hidden), drawn(width, hidden)) for _ in every]
        down = [(drawn(hidden, width),) for _ in every]
        self.gate_up, self.down = (
            np.stack([np.concatenate([matrix_of(tensor) for tensor in tensors]) for tensors in stack])
            for stack in (gate_up, down)
        )
        on_device = None if bias is None else to_device(backend, bias)
        self.weights = ExpertWeights(config, None, on_device, *backend.upload_experts(gate_up, down))
        self.held = backend.held_experts(gate_up, down)


def multiplied(
    backend: Any, layer: Layer, x: np.ndarray, dtype: str, logits: np.ndarray, many: bool | None, rng: Any
) -> tuple[Any, int]:
    """The device's result, and the experts that it counts; `many` as of `expert_plans`."""
    import cupy

    from losart.backends.cuda.experts import experts

    backend.kernels.deterministic = many is not None
    with backend.memory.stream:
        used = cupy.full(1, 5, np.int32)
        arguments = to_device(backend, x, dtype), as_matmul(backend, logits, rng), layer.weights, bool(many)
        result = experts(backend.kernels, *arguments, used)
        return result, int(on_host(backend, used)[0]) - 5


@steady(40)
@given(configs(), st.integers(1, 200), st.sampled_from(["random", "one"]), st.integers(0, 99))
@example(ExpertsConfig(128, 8, 64), 2048, "random", 0)
@example(ExpertsConfig(1024, 8, 4, bias=True), 300, "random", 1)
def test_routes(config, tokens, kind, seed):
    """Experts, weights and lists are those of the CPU's rule."""
    from losart.backends.cuda.expert_plans import ExpertShape, lists_plan, route_plan
    from losart.backends.cuda.experts import Routing

    rng = np.random.default_rng(seed)
    backend = new_backend("float32", kv_heads=1, group=1, width=16)
    logits = logits_of(kind, tokens, config.count, rng)
    bias = rng.standard_normal(config.count).astype(np.float32) if config.bias else None
    every, slots, tile = config.count + config.shared, config.per_token + config.shared, 16
    shape = ExpertShape(every, slots, config.intermediate_size, 32)
    with backend.memory.stream:
        routing, used = Routing(shape, tokens, tile), to_device(backend, np.zeros(1, np.int32))
        on_device = None if bias is None else to_device(backend, bias)
        numbers = config.count, config.per_token, config.groups, config.kept_groups
        rule = int(config.scores == "sigmoid"), int(config.normalize), float(config.scaling)
        matmul = as_matmul(backend, logits, rng)
        plan = route_plan(config.count, tokens)
        backend.kernels.launch_plan(plan, matmul.view, on_device, routing.view, *numbers, *rule)
        backend.kernels.launch_plan(lists_plan(shape, tokens), routing.view, config.count, tile, used)
    chosen, weights = route(logits, bias, config)
    shared = np.broadcast_to(np.arange(config.count, every), (tokens, config.shared))
    chosen = np.concatenate([chosen, shared], axis=1)
    weights = np.concatenate([weights, np.ones(shared.shape, np.float32)], axis=1)
    found = on_host(backend, routing.experts, routing.weights, routing.places, routing.items, used)
    np.testing.assert_array_equal(found[0], chosen)
    np.testing.assert_allclose(found[1], weights, rtol=2e-6, atol=1e-9)
    places = np.argsort(chosen.reshape(-1), kind="stable")
    np.testing.assert_array_equal(found[2].reshape(-1), places)
    items, first = [], 0
    for expert, count in enumerate(np.bincount(chosen.reshape(-1), minlength=every)):
        items += [(expert, first + i, min(tile, count - i)) for i in range(0, count, tile)]
        first += count
    assert int(on_host(backend, routing.item_count)[0]) == len(items)
    np.testing.assert_array_equal(found[3][: len(items)], items)
    assert found[4][0] == len(np.unique(chosen[:, : config.per_token]))


@steady(40)
@given(
    st.sampled_from(DTYPES),
    configs(),
    st.integers(1, 200),
    st.sampled_from([4, 32, 136, 260]),
    st.sampled_from(["random", "one"]),
    cards(),
    st.sampled_from([None, False, True]),
)
@example("bfloat16", ExpertsConfig(128, 8, 768), 16, 2048, "random", {}, None)
@example("bfloat16", ExpertsConfig(64, 8, 512, shared=1), 1024, 256, "random", {}, False)
@example("float16", ExpertsConfig(16, 4, 264, shared=1), 700, 264, "random", {}, True)
@example("bfloat16", ExpertsConfig(16, 4, 264, shared=1), 700, 264, "one", {"capability": (8, 6)}, True)
@example("float32", ExpertsConfig(128, 8, 30, shared=2), 33, 60, "one", {}, None)
def test_experts(dtype, config, tokens, hidden, kind, card, many):
    rng = np.random.default_rng(tokens + hidden + config.count)
    backend = new_backend(dtype, card, kv_heads=1, group=1, width=16)
    layer = Layer(backend, dtype, config, hidden, rng)
    x = rng.standard_normal((tokens, hidden), np.float32)
    logits = logits_of(kind, tokens, config.count, rng)
    result, used = multiplied(backend, layer, x, dtype, logits, many, rng)
    chosen, _ = route(logits, layer.bias, config)
    assert used == len(np.unique(chosen))
    rounded = widened(narrow(x, FORMATS[dtype]), dtype)
    assert_close(matmul_array(backend, result), layer.expected(rounded, logits), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True])
def test_a_row_is_summed_alike_whatever_else_there_is(dtype, many):
    rng = np.random.default_rng(0)
    config = ExpertsConfig(32, 4, 136, scores="sigmoid", shared=1)
    backend = new_backend(dtype, kv_heads=1, group=1, width=16)
    layer = Layer(backend, dtype, config, 264, rng)
    x, logits = rng.standard_normal((300, 264), np.float32), logits_of("random", 300, 32, rng)
    every, _ = multiplied(backend, layer, x, dtype, logits, many, rng)
    planes = on_host(backend, every.planes)
    for rows in (slice(7, 8), slice(0, 9), slice(100, 140), slice(37, 300)):
        some, _ = multiplied(backend, layer, x[rows], dtype, logits[rows], many, rng)
        np.testing.assert_array_equal(on_host(backend, some.planes), planes[:, rows])


@steady(40)
@given(
    st.sampled_from(["bfloat16", "float16"]),
    st.sampled_from(FORMS),
    configs(),
    st.integers(1, 200),
    st.sampled_from([1, 2, 5, 16, 33]),
    st.sampled_from([1, 2, 8, 9, 32]),
    st.sampled_from(["random", "one"]),
    st.sampled_from([{}, {"sms": 1}, {"sms": 7}, {"capability": (8, 6), "shared_per_block": 99 << 10}]),
)
@example("bfloat16", ("int4", 64, False, False), ExpertsConfig(128, 8, 8), 16, 80, 96, "random", {})
@example("bfloat16", ("int8", 0, False, True), ExpertsConfig(8, 4, 8, shared=1), 700, 16, 33, "one", {})
@example("float16", ("int4", 32, True, False), ExpertsConfig(16, 2, 8, shared=2), 300, 32, 16, "one", {})
def test_experts_of_codes(dtype, form, config, tokens, hidden_eighths, width_eighths, kind, card):
    rng = np.random.default_rng(tokens + hidden_eighths + config.count)
    backend = new_backend(dtype, card, kv_heads=1, group=1, width=16)
    hidden, width = (columns_of(form, eighths) for eighths in (hidden_eighths, width_eighths))
    config = replace(config, intermediate_size=width, count=min(config.count, 16), groups=1, kept_groups=1)
    layer = CodedLayer(backend, dtype, config, hidden, form, rng)
    stacks = layer.weights.gate_up, layer.weights.down
    assert layer.held == {form[0]: sum(stack.nbytes for stack in stacks)}
    x = rng.standard_normal((tokens, hidden), np.float32)
    logits = logits_of(kind, tokens, config.count, rng)
    result, used = multiplied(backend, layer, x, dtype, logits, None, rng)
    chosen, _ = route(logits, layer.bias, config)
    assert used == len(np.unique(chosen))
    rounded = widened(narrow(x, FORMATS[dtype]), dtype)
    assert_close(matmul_array(backend, result), layer.expected(rounded, logits), TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS[::3], ids=str)
@pytest.mark.parametrize("deterministic", [None, False, True])
def test_sums_of_codes_do_not_depend_on_how_many_rows_there_are(form, deterministic):
    """Not even without `deterministic`: with few rows of an expert, and with many."""
    rng = np.random.default_rng(0)
    config = ExpertsConfig(32, 4, 384, scores="sigmoid", shared=1)
    backend = new_backend("bfloat16", kv_heads=1, group=1, width=16)
    layer = CodedLayer(backend, "bfloat16", config, 640, form, rng)
    x, logits = rng.standard_normal((300, 640), np.float32), logits_of("random", 300, 32, rng)
    every, _ = multiplied(backend, layer, x, "bfloat16", logits, deterministic, rng)
    planes = on_host(backend, every.planes)
    for rows in (slice(7, 8), slice(0, 9), slice(100, 140), slice(37, 300)):
        some, _ = multiplied(backend, layer, x[rows], "bfloat16", logits[rows], deterministic, rng)
        np.testing.assert_array_equal(on_host(backend, some.planes), planes[:, rows])


def test_experts_of_which_some_cannot_stay_codes_are_held_in_16_bits():
    """Here the second matrix, whose rows have zeros and would have to be padded."""
    rng = np.random.default_rng(0)
    backend = new_backend("float16", kv_heads=1, group=1, width=16)
    config, form = ExpertsConfig(4, 2, 72), ("int4", 64, True, False)
    layer = CodedLayer(backend, "float16", config, 128, form, rng)
    assert layer.held == {"float16": 2 * 4 * 3 * 72 * 128}
    x, logits = rng.standard_normal((9, 128), np.float32), logits_of("random", 9, 4, rng)
    result, _ = multiplied(backend, layer, x, "float16", logits, None, rng)
    rounded = widened(narrow(x, FORMATS["float16"]), "float16")
    assert_close(matmul_array(backend, result), layer.expected(rounded, logits), TOLERANCE["float16"])


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
PROMPTS = [np.random.default_rng(seed).integers(0, 300, 3 + 90 * seed).tolist() for seed in range(4)]
OPTIONS = [
    {},
    {"block_length": 16, "remasking": "low_confidence_static", "denoising_steps": 3},
    {"attention": "losa", "budget": 32},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_tokens_are_those_of_the_cpu(make_checkpoint, seed, number):
    """Alone and together, launched one by one and replayed; in float32."""
    experts = {"num_experts": (8, 16, 32, 8)[seed], "num_experts_per_tok": (2, 8, 4, 1)[seed]}
    experts |= {"moe_intermediate_size": (64, 36, 64, 128)[seed], "norm_topk_prob": seed != 1}
    experts["mlp_only_layers"] = [1] if seed == 2 else []
    path = make_checkpoint(family="sdar_moe", extra_config=experts, seed=seed, **SIZES)
    cpu, cuda = (losart.load(path, device=device) for device in ("cpu", "cuda"))
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 4, **OPTIONS[number]}
    expected = cpu.generate(PROMPTS, **options)
    alone = [cuda.generate(prompt, **options) for prompt in PROMPTS]
    for found in (alone, cuda.generate(PROMPTS, **options), cuda.generate(PROMPTS, **options)):
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    by_cpu = [cpu.generate(prompt, **options).stats.experts_used for prompt in PROMPTS]
    assert [one.stats.experts_used for one in alone] == pytest.approx(by_cpu)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_sequences_of_16_bits_share_passes(make_checkpoint, dtype, deterministic):
    path = make_checkpoint(family="sdar_moe", dtype=dtype, head_dim=64, head_gain=1.0, **SIZES)
    model = losart.load(path, device="cuda", deterministic=deterministic)
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 16}
    alone = [model.generate(prompt, **options).token_ids for prompt in PROMPTS]
    together = [one.token_ids for one in model.generate(PROMPTS, **options)]
    assert [len(one) for one in together] == [40] * len(PROMPTS)
    assert not deterministic or together == alone


PROMPT = np.random.default_rng(0).integers(0, 250, 611).tolist()
WRITTEN = {
    "gptq": ({"bits": 4, "group_size": 128}, partial(gptq, bits=4, group=128, version=1, shuffled=False)),
    "gptq, shuffled": (
        {"bits": 8, "group_size": 64, "desc_act": True},
        partial(gptq, bits=8, group=64, version=1, shuffled=True),
    ),
    "awq": ({"bits": 4, "group_size": 128}, partial(awq, group=128)),
    "fp8": ({"weight_block_size": [128, 128]}, partial(fp8, block=(128, 128))),
}


@pytest.mark.parametrize("family", ["sdar_moe", "llada2.0"])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_tokens_with_rounded_weights_are_those_of_the_cpu(tmp_path, family, weights):
    """In float32, alone and together, launched one by one and replayed."""
    name, options = FAMILIES[family]
    path = write_checkpoint(tmp_path, family=name, **SMALL | {"intermediate_size": 128})
    cpu, cuda = (losart.load(path, device=device, weights=weights) for device in ("cpu", "cuda"))
    cpu = with_plain_weights(with_rounded_embedding(cpu))
    options = options | {"max_new_tokens": 40, "stop_token_ids": []}
    expected = [one.token_ids for one in cpu.generate(PROMPTS, **options)]
    assert [cuda.generate(prompt, **options).token_ids for prompt in PROMPTS] == expected
    for _ in range(2):
        assert [one.token_ids for one in cuda.generate(PROMPTS, **options)] == expected


@pytest.mark.parametrize("family", ["sdar_moe", "llada2.0"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8", *WRITTEN])
def test_logits_with_quantized_weights_are_those_of_the_cpu(tmp_path, family, dtype, weights):
    """All tokens go to all experts: rounding might choose others."""
    experts = {"num_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    sizes = SMALL | {"hidden_size": 256, "intermediate_size": 384, "num_layers": 2, "head_dim": 64}
    sizes |= {"extra_config": experts | {"moe_intermediate_size": 128}, "head_gain": 1.0}
    written = WRITTEN.get(weights)
    source = "float32" if written else dtype
    path = write_checkpoint(tmp_path, family=FAMILIES[family][0], dtype=source, **sizes)
    rounded = {"weights": "auto" if written else weights}
    if written:
        config, write = written
        quantize_checkpoint(path, {"quant_method": weights.split(",")[0]} | config, write)
    model, cpu = (losart.load(path, device, dtype, **rounded) for device in ("cuda", "cpu"))
    cpu = with_plain_weights(cpu if written else with_rounded_embedding(cpu))
    stays = "shuffled" not in weights and (dtype == "float16" or weights not in ("gptq", "awq"))
    held = {"int4": "int4", "int8": "int8", "fp8": "float8"}
    if written:
        assert len(model.weights) == 1 + stays
    else:
        assert {held[weights], "int8"} <= set(model.weights)
    found, expected = (hidden_states(one, PROMPT, 16) for one in (model, cpu))
    assert relative_error(found, expected) <= 2e-2


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_sequences_of_quantized_experts_share_passes(make_checkpoint, weights):
    """With `deterministic` bit for bit."""
    path = make_checkpoint(family="sdar_moe", dtype="bfloat16", head_dim=64, head_gain=1.0, **SIZES)
    model = losart.load(path, device="cuda", weights=weights, deterministic=True)
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 16}
    alone = [model.generate(prompt, **options).token_ids for prompt in PROMPTS]
    for _ in range(3):
        assert [one.token_ids for one in model.generate(PROMPTS, **options)] == alone
