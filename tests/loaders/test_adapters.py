"""Adapters: what is merged, into which matrices, and which files are refused."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import PREFIX, products, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import quantize_checkpoint
from safetensors.numpy import load_file, save_file
from test_quantized import CASES, SIZES

import losart
from losart.backends.cpu.convert import float32_of
from losart.errors import CheckpointError, ConfigError, LosartError, OptionError, TensorError
from losart.loaders import MappedTensor, open_checkpoint
from losart.measure.inspection import inspection
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import loaded_tensors
from losart.quantization.merging import MergedQuantized, MergedTensor

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "head_dim": 16}
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), **SMALL)


def loaded(base: Path, adapter: Path, weights: str = "auto", merge: str = "dtype") -> dict[str, Any]:
    return loaded_tensors(open_checkpoint(base, adapter), weights, "cpu", merge)


def values_of(tensor: Any) -> np.ndarray:
    return float32_of(tensor, 0, tensor.shape[0]) if len(tensor.shape) == 2 else tensor.array()


def merged_by_hand(base: Path, tensors: dict[str, np.ndarray], scales: Any) -> dict[str, np.ndarray]:
    """By name in the base's file, in float64 and rounded once; `scales` from a module's name to its scale."""
    merged = dict(load_file(base / "model.safetensors"))
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
            matrix = f"{module}.weight"
            merged[matrix] = (merged[matrix] + scales(module) * (b @ a)).astype(np.float32)
    return merged


def test_products_are_added(base: Path, tmp_path: Path) -> None:
    tensors = products(base, {"layers.1.self_attn.q_proj": 2, "q_proj": 4, "down_proj": 4, "up_proj": 3})
    adapter = write_adapter(
        tmp_path,
        tensors,
        rank_pattern={r"layers\.1\..*q_proj": 2, "up_proj": 3},
        alpha_pattern={"down_proj": 5.0},
    )
    scales = {"down_proj": 5 / 4, "up_proj": 8 / 3}

    def scale(module: str) -> float:
        return 8 / 2 if "1.self_attn.q" in module else scales.get(module.rpartition(".")[2], 8 / 4)

    checkpoint, expected = open_checkpoint(base, adapter), merged_by_hand(base, tensors, scale)
    assert len(checkpoint.changes) == 6
    for name, tensor in loaded_tensors(checkpoint, "auto", "cpu").items():
        source = checkpoint.tensors[name]
        np.testing.assert_allclose(values_of(tensor), expected[source.name], rtol=1e-6, atol=1e-6)
        # Only what is adapted leaves the mapped file.
        assert (tensor is source) == (name not in checkpoint.changes)
        assert isinstance(tensor, MappedTensor if tensor is source else MergedTensor)


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_answers_are_those_of_merged_files(base: Path, tmp_path: Path, stabilized: bool) -> None:
    tensors = products(base, {"_proj": 4})
    adapter = write_adapter(tmp_path / "adapter", tensors, use_rslora=stabilized)
    scale = 8 / math.sqrt(4) if stabilized else 8 / 4
    merged = write_checkpoint(tmp_path / "merged", **SMALL)
    save_file(merged_by_hand(base, tensors, lambda module: scale), merged / "model.safetensors")
    one, other, plain = (
        losart.generate(path, "Why?", device="cpu", adapter=lora, max_new_tokens=24, confidence_threshold=0.3)
        for path, lora in ((base, adapter), (merged, None), (base, None))
    )
    assert one.token_ids == other.token_ids != plain.token_ids
    assert losart.load(base, "cpu", adapter=adapter).adapter == adapter


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 40),
    alpha=st.floats(0.1, 64),
    cut=st.integers(0, 64),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
def test_rows_are_merged_in_any_pieces(
    base: Path, rank: int, alpha: float, cut: int, dtype: Any, seed: int
) -> None:
    tensors = products(base, {"0.self_attn.q_proj": rank}, seed, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(Path(folder), tensors, r=rank, lora_alpha=alpha, target_modules=[Q])
        tensor = loaded(base, adapter)["layers.0.q"]
        found = np.concatenate([tensor.float32(0, cut), tensor.float32(cut, 64)])
    expected = merged_by_hand(base, tensors, lambda module: alpha / rank)[f"{Q}.weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "more", "adapted"),
    [
        (["q_proj", "mlp.up_proj"], {}, {"0.q", "1.q", "0.up", "1.up"}),
        ([Q], {}, {"0.q"}),
        (r".*\.1\.(self_attn|mlp)\.(k|gate)_proj", {}, {"1.k", "1.gate"}),
        (
            "all-linear",
            {},
            {f"{i}.{name}" for i in (0, 1) for name in LINEAR},
        ),
        (["q_proj"], {"layers_to_transform": 1}, {"1.q"}),
        (["q_proj"], {"layers_to_transform": [0], "layers_pattern": "layers"}, {"0.q"}),
        ([Q, "o_proj"], {"layers_to_transform": [1]}, {"0.q", "1.o"}),
        (["q_proj", "o_proj"], {"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"1.q", "0.o", "1.o"}),
        ("all-linear", {"exclude_modules": r".*(mlp|\.0\.).*"}, {"1.q", "1.k", "1.v", "1.o"}),
    ],
)
def test_targets(base: Path, tmp_path: Path, targets: Any, more: Any, adapted: set[str]) -> None:
    names = {
        tensor.name.removesuffix(".weight"): name for name, tensor in open_checkpoint(base).tensors.items()
    }
    ends = {module: 4 for module, name in names.items() if name.removeprefix("layers.") in adapted}
    tensors = products(base, ends)
    assert len(tensors) == 2 * len(adapted)
    adapter = write_adapter(tmp_path, tensors, target_modules=targets, **more)
    changes = open_checkpoint(base, adapter).changes
    assert {name.removeprefix("layers.") for name in changes} == adapted


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    """To what they are held in, however the base is saved."""
    base = write_checkpoint(tmp_path / "base", **SMALL, dtype="bfloat16")
    plain = write_checkpoint(tmp_path / "float32", **SMALL)
    adapter = write_adapter(tmp_path / "adapter", products(plain, {"q_proj": 4}, std=1e-3))
    tensor = loaded(base, adapter)["layers.0.q"]
    values = tensor.float32(0, 64)
    bits = values.view(np.uint32)
    assert (bits & 0xFFFF).any(), "not rounded to the base's dtype"
    for dtype, name in (("float32", np.float32), ("float16", np.float16)):
        layer = losart.load(base, "cpu", dtype, adapter=adapter)._engine.runner.layers[0]
        np.testing.assert_array_equal(layer.qkv.matrices[0], values.astype(name))


def test_weights_that_are_rounded_while_loading_are_merged_before(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", **SMALL | {"hidden_size": 64, "intermediate_size": 128})
    adapter = write_adapter(tmp_path / "adapter", products(base, {"up_proj": 4}))
    merged, rounded = (loaded(base, adapter, weights)["layers.1.up"] for weights in ("auto", "int8"))
    exact, found = merged.float32(0, 128), rounded.float32(0, 128)
    assert np.all(np.abs(exact - found) <= np.abs(exact).max(1, keepdims=True) / 254 * 1.0001)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("fp8,")])
def test_quantized_matrices_keep_their_format_and_groups(tmp_path: Path, case: str) -> None:
    plain, base = (write_checkpoint(tmp_path / name, **SIZES | {"num_layers": 1}) for name in ("one", "two"))
    quantize_checkpoint(base, *CASES[case])
    adapter = write_adapter(tmp_path / "adapter", products(plain, {"up_proj": 4, "q_proj": 4}, std=0.05))
    before, after = open_checkpoint(base).tensors, loaded(base, adapter, merge="codes")
    widened = loaded(base, adapter)
    for name in ("layers.0.q", "layers.0.up"):
        was, now = before[name], after[name]
        assert isinstance(now, MergedQuantized) and not isinstance(was, MappedTensor)
        assert (now.dtype, now.group, now.in_order) == (was.dtype, was.group, was.in_order)
        exact = now.float32(0, was.shape[0])
        assert type(widened[name]) is MergedTensor and widened[name].dtype == "float32"
        np.testing.assert_array_equal(widened[name].float32(0, was.shape[0]), exact)
        assert not np.array_equal(exact, was.float32(0, was.shape[0]))
        if not now.in_order:
            continue  # held in the model's dtype
        codes, scales, zeros = now.rows(0, was.shape[0])
        assert (zeros is not None) == now.uses_zeros
        if now.dtype == "float8":
            step = np.abs(exact) / 16 + np.repeat(scales, was.group, 1)[:, : was.shape[1]] * 2.0**-9
            codes = losart.loaders.quantized.float8.FLOAT8_VALUES[codes]
        else:
            # Half a step, and of float16 or bfloat16 scales a little at the outermost codes.
            step = np.repeat(scales, was.group, 1)[:, : was.shape[1]]
            step = np.abs(step) * (0.5 + 2.0**-8 * (1 << was.bits) + (1 if was.dtype == "int4" else 0.5))
        wide = np.repeat(scales, was.group, 1)[:, : was.shape[1]]
        offset = 0 if zeros is None else np.repeat(zeros, was.group, 1)[:, : was.shape[1]]
        assert np.all(np.abs((codes - offset) * wide - exact) <= step)
    # The others' codes are those of the files.
    assert after["layers.0.k"] is not None and not isinstance(after["layers.0.k"], MergedTensor)
    if case in ("packed 4, groups, zeros", "float 8, channels"):
        model = losart.load(base, "cpu", adapter=adapter, merge="codes")
        assert model.weights == losart.load(base, "cpu").weights
        model.generate("Why?", max_new_tokens=4)
        losart.load(base, "cpu", adapter=adapter).generate("Why?", max_new_tokens=4)
    with pytest.raises(OptionError, match="merge must be one of dtype, codes, not 'int4'"):
        loaded(base, adapter, merge="int4")


def test_modules_and_rows_that_are_replaced(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    norm, head = rng.normal(1, 0.1, 32).astype(np.float32), rng.normal(0, 1, (320, 32)).astype(np.float16)
    rows = rng.normal(0, 1, (2, 32)).astype(np.float32)
    tensors = products(base, {"q_proj": 4}) | {
        f"{PREFIX}model.norm.weight": norm,
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows,
    }
    saved = ["lm_head", "model.norm"]
    adapter = write_adapter(tmp_path, tensors, modules_to_save=saved, trainable_token_indices=[319, 7])
    found, before = loaded(base, adapter), open_checkpoint(base).tensors
    np.testing.assert_array_equal(values_of(found["final_norm"]), norm)
    np.testing.assert_array_equal(values_of(found["head"]), head.astype(np.float32))
    expected = before["embed"].array().copy()
    expected[[319, 7]] = rows
    np.testing.assert_array_equal(values_of(found["embed"]), expected)
    losart.generate(base, "Why?", device="cpu", adapter=adapter, max_new_tokens=4)


def test_an_embedding_that_is_the_head_too(tmp_path: Path) -> None:
    """A replaced one is the embedding alone, as in PEFT; replaced rows are of both."""
    base, rng = write_checkpoint(tmp_path / "base", **SMALL, tied=True), np.random.default_rng(0)
    embed = rng.normal(0, 1, (320, 32)).astype(np.float32)
    name = f"{PREFIX}model.embed_tokens"
    adapter = write_adapter(
        tmp_path / "one", {f"{name}.weight": embed}, modules_to_save=["embed_tokens"], target_modules=[]
    )
    found = loaded(base, adapter)
    np.testing.assert_array_equal(values_of(found["embed"]), embed)
    assert found["head"] is not found["embed"] and found["head"].file == base / "model.safetensors"
    rows = {f"{name}.token_adapter.trainable_tokens_delta": embed[:1]}
    adapter = write_adapter(
        tmp_path / "two", rows, target_modules=None, trainable_token_indices={"embed_tokens": [3]}
    )
    found = loaded(base, adapter)
    assert "head" not in found
    np.testing.assert_array_equal(values_of(found["embed"])[3], embed[0])
    both = {
        f"{PREFIX}lm_head.lora_A.weight": embed[:4],
        f"{PREFIX}lm_head.lora_B.weight": embed[:, :4].copy(),
    }
    with pytest.raises(TensorError, match=r"'.*lm_head\.lora_A\.weight' adapts what is embedding and head"):
        open_checkpoint(base, write_adapter(tmp_path / "three", both))


def write(directory: Path, **config: Any) -> Any:
    def edit(tensors: Any, base: Path) -> Path:
        return write_adapter(directory, tensors, **config)

    return edit


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', not 'LOHA'"),
        ({"peft_type": ...}, "missing key 'peft_type'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias must be 'none', not 'all'"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
        ({"something_new": {"a": 1}}, "something_new is not supported"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16' is not supported"),
        ({"target_modules": None}, "missing key 'target_modules'"),
        ({"target_modules": [3]}, "target_modules must be a list of names"),
        ({"target_modules": "(q_proj"}, "target_modules must be a regular expression"),
        ({"r": 0}, "r must be an integer from 1"),
        ({"r": ...}, "missing key 'r'"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\.q_proj must be an integer from 1"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern must be a regular expression"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be an integer from 0"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices must be a list of tokens"),
        ({"trainable_token_indices": [320]}, "trainable_token_indices must be below the base's 320 tokens"),
    ],
)
def test_configurations_that_are_refused(base: Path, tmp_path: Path, changes: Any, says: str) -> None:
    adapter = write_adapter(tmp_path, products(base, {"q_proj": 4}), **changes)
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {says}"):
        open_checkpoint(base, adapter)


@pytest.mark.parametrize(
    ("name", "values", "config", "says"),
    [
        (f"{Q}.lora_A.weight", np.ones((3, 32)), {}, r"lora_A\.weight' has the shape \[3, 32\]; .*\[4, 32\]"),
        (f"{Q}.lora_B.weight", np.ones((60, 4)), {}, r"lora_B\.weight' has the shape \[60, 4\]; .*\[64, 4\]"),
        (
            f"{Q}.lora_A.weight",
            None,
            {},
            r"q_proj\.lora_A\.weight' is missing, although",
        ),
        ("model.layers.7.self_attn.q_proj.lora_A.weight", np.ones((4, 32)), {}, "that the base has not"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", np.ones((4, 32)), {}, "does not name: '.*up_proj"),
        ("model.norm.weight", np.ones(32), {}, r"does not name: '.*model\.norm\.weight'"),
        ("model.norm.weight", np.ones(31), {"modules_to_save": ["norm"]}, r"shape \[31\]"),
        (f"{Q}.lora_magnitude_vector", np.ones(64), {}, "lora_magnitude_vector' is none of a LoRA"),
        (f"{Q}.lora_B.bias", np.ones(64), {}, "lora_B.bias"),
        (f"{Q}.lora_A.weight", np.ones((4, 32), np.int64), {}, "has the dtype int64"),
        ("model.embed_tokens.lora_embedding_A", np.ones((4, 320)), {}, "does not name"),
    ],
)
def test_tensors_that_are_refused(
    base: Path, tmp_path: Path, name: str, values: Any, config: Any, says: str
) -> None:
    tensors = products(base, {"q_proj": 4})
    if values is None:
        tensors.pop(PREFIX + name)
    else:
        tensors[PREFIX + name] = values if values.dtype == np.int64 else values.astype(np.float32)
    adapter = write_adapter(tmp_path, tensors, **{"target_modules": ["q_proj"]} | config)
    with pytest.raises(TensorError, match=rf"adapter_model\.safetensors: tensor.*{says}"):
        open_checkpoint(base, adapter)


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(base: Path, tmp_path: Path, part: str, value: float) -> None:
    tensors = products(base, {"q_proj": 4})
    tensors[f"{PREFIX}{Q}.lora_{part}.weight"][1, 1] = value
    adapter = write_adapter(tmp_path, tensors)
    with pytest.raises(TensorError, match=rf"'.*{Q}\.lora_{part}\.weight' has values that are not finite"):
        losart.load(base, "cpu", adapter=adapter)


def test_experts_are_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", **SMALL, family="sdar_moe")
    tensors = products(base, {"experts.1.up_proj": 4})
    with pytest.raises(TensorError, match=r"adapts an expert, 'model\.layers\.0\.mlp\.experts"):
        open_checkpoint(base, write_adapter(tmp_path / "adapter", tensors))


def test_files_that_are_missing_or_broken(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        open_checkpoint(base, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="an adapter is named by a string or a path, not 3"):
        open_checkpoint(base, 3)  # type: ignore[arg-type]
    adapter = write_adapter(tmp_path / "adapter", products(base, {"q_proj": 4}))
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    for broken in (b"", content[:40], content[:-1]):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: not a sound"):
            open_checkpoint(base, adapter)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        open_checkpoint(base, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"this one has adapter_model\.bin"):
        open_checkpoint(base, adapter)
    (adapter / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected a JSON object"):
        open_checkpoint(base, adapter)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_an_error_of_ours_or_none(base: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(
            Path(folder), products(base, {"0.self_attn.q_proj": 2}), r=2, target_modules=[Q]
        )
        file = adapter / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        try:
            for tensor in loaded(base, adapter).values():
                values_of(tensor)
        except LosartError as error:
            assert file.name in str(error) or "adapter" in str(error)


# -- what makes an ordinary model fill in blocks

CONVERSION = {"family": "Fast_dLLM_Qwen", "block_length": 8, "mask_token_id": 315}


def ordinary(directory: Path, **changes: Any) -> Path:
    """A Llama with random weights."""
    base = write_checkpoint(directory, **SMALL, family="stable_diffcoder")
    keys = json.loads((base / "config.json").read_text())
    keys |= {"architectures": ["LlamaForCausalLM"]} | changes
    (base / "config.json").write_text(json.dumps(keys))
    return base


def test_an_ordinary_model_that_an_adapter_was_trained_to_fill_in_blocks(tmp_path: Path) -> None:
    base = ordinary(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", products(base, {"q_proj": 4}))
    with pytest.raises(ConfigError, match=r"'llama' predicts the next token, .*unless losart.json"):
        open_checkpoint(base, adapter)
    (adapter / "losart.json").write_text(json.dumps(CONVERSION))
    config = open_checkpoint(base, adapter).config
    assert (config.model_type, config.block_length, config.mask_token_id) == ("Fast_dLLM_Qwen", 8, 315)
    assert config.decoding.shifted and not config.head_norms
    result = losart.generate(base, "Why?", device="cpu", adapter=adapter, threshold=0.3, max_new_tokens=12)
    assert len(result.token_ids) == 12 or result.finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "gpt2"}, r"losart\.json: family must be one of Fast_dLLM_Qwen, .*not 'gpt2'"),
        ({"family": None}, r"losart\.json: missing key 'family'"),
        ({"block_length": 0}, r"losart\.json: block_length must be an integer from 1"),
        ({"block_length": 99999}, r"losart\.json: block_length \(99999\) must not be more than"),
        ({"mask_token_id": 320}, r"losart\.json: token id 320 of the configuration is outside"),
        ({"mask_token_id": None}, r"losart\.json: missing key 'mask_token_id'"),
        ({"blocks": 3}, r"losart\.json: blocks is not a key"),
    ],
)
def test_conversions_that_are_refused(tmp_path: Path, changes: Any, says: str) -> None:
    base = ordinary(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", products(base, {"q_proj": 4}))
    (adapter / "losart.json").write_text(json.dumps(CONVERSION | changes))
    with pytest.raises(ConfigError, match=says):
        open_checkpoint(base, adapter)


def test_a_base_of_another_family_than_the_adapters(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, products(base, {"q_proj": 4}))
    (adapter / "losart.json").write_text(json.dumps(CONVERSION))
    with pytest.raises(ConfigError, match=r"losart\.json: family is 'Fast_dLLM_Qwen', .*is 'sdar'"):
        open_checkpoint(base, adapter)
    (adapter / "losart.json").write_text(json.dumps(CONVERSION | {"family": "sdar"}))
    assert open_checkpoint(base, adapter).config.block_length == 8


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_models_are_told_apart_by_what_is_merged(base: Path, tmp_path: Path, weights: str) -> None:
    tensors = products(base, {"0.self_attn.q_proj": 4})
    adapters = [
        write_adapter(tmp_path / str(alpha), tensors, target_modules=[Q], lora_alpha=alpha)
        for alpha in (4, 8)
    ]
    models = [losart.load(base, "cpu", weights=weights, adapter=adapter) for adapter in (None, *adapters)]
    assert len({model.fingerprint for model in models}) == 3


def test_inspect_says_what_is_merged(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, products(base, {"q_proj": 4, "up_proj": 4}))
    facts = inspection(open_checkpoint(base, adapter), "cpu")
    assert facts["adapter"] == {
        "path": str(adapter),
        "products": 4,
        "ranks": [4],
        "replaced": 0,
        "rows": 0,
        "merged_in": ["float32"],
    }
    assert inspection(open_checkpoint(base), "cpu")["adapter"] is None
