"""GGUF files: what is read of them, and which are refused."""

from __future__ import annotations

import json
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import products, write_adapter
from gguf_files import TYPES, parts_of, text, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

import losart
from losart.backends.cpu.convert import float32_of
from losart.config.rope import RopeConfig, inverse_frequencies
from losart.errors import CheckpointError, ConfigError, LosartError, OptionError, TensorError
from losart.loaders import QuantizedTensor, open_checkpoint
from losart.loaders.gguf.reader import read_gguf
from losart.loaders.gguf.tensors import WideTensor
from losart.measure.inspection import inspection
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import WeightFormat, loaded_tensors, quantize_checkpoint

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "head_dim": 16}
WIDE = SMALL | {"hidden_size": 256, "intermediate_size": 256, "num_layers": 1, "head_dim": 64}
FAMILIES = ("stable_diffcoder", "Fast_dLLM_Qwen", "sdar")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: write_checkpoint(folder / name, **SMALL, family=name, tied=name == "sdar") for name in FAMILIES
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose file is small."""
    sizes: dict[str, Any] = SMALL | {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1}
    folder = tmp_path_factory.mktemp("small")
    return write_checkpoint(folder, **sizes, family="stable_diffcoder", vocab_size=264)


def write(base: Path, file: Path, family: str, kind: str = "F32", **more: Any) -> Path:
    return write_gguf(file, *parts_of(base, family, kind, **more))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_answers_as_the_directory_that_it_was_made_of(bases: Any, tmp_path: Path, family: str) -> None:
    """Of Llama's, Qwen2's and Qwen3's shape, with a head and without."""
    file = write(bases[family], tmp_path / "model.gguf", family)
    found, expected = open_checkpoint(file), open_checkpoint(bases[family])
    # The file's number is in float32, and it has two end tokens of which a family may take one.
    values = {name: getattr(expected.config, name) for name in ("rms_norm_eps", "end_token_ids")}
    config = replace(found.config, **values)
    assert found.config.rms_norm_eps == np.float32(config.rms_norm_eps)
    assert found.config.end_token_ids == (314, 312)
    assert config == expected.config and found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].array(), tensor.array())
    messages = [{"role": "user", "content": "Why is <|im_end|> 12 ü?"}]
    options = {"device": "cpu", "max_new_tokens": 20, "confidence_threshold": 0.3, "stop_token_ids": [314]}
    one, other = (losart.generate(path, messages[0]["content"], **options) for path in (file, bases[family]))
    assert one.token_ids == other.token_ids and one.text == other.text
    losart.generate(str(file), messages, **options)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_what_matrices_are_held_in(tmp_path: Path, kind: str) -> None:
    base = write_checkpoint(tmp_path / "base", **WIDE, family="stable_diffcoder", tied=True)
    file = write(base, tmp_path / "model.gguf", "stable_diffcoder", kind)
    checkpoint = open_checkpoint(file)
    model = losart.load(file, "cpu")
    codes = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}.get(kind)
    assert model.dtype == ("bfloat16" if kind == "BF16" else "float16")
    assert model.weights == (("float16", codes) if codes else (model.dtype,))
    for name in ("layers.0.q", "layers.0.down"):
        tensor = checkpoint.tensors[name]
        assert isinstance(tensor, QuantizedTensor) == (codes is not None)
        if codes is None:
            continue
        assert (tensor.dtype, tensor.group) == (codes, 32)
        exact, rows = tensor.float32(0, tensor.shape[0]), tensor.rows(16, 48)
        wide = np.repeat(rows[1], 32, 1)
        zeros = 0 if rows[2] is None else np.repeat(rows[2], 32, 1)
        # Codes, scales and zeros stand for the same, but for float32's rounding.
        largest = np.abs(exact).max()
        np.testing.assert_allclose((rows[0] - zeros) * wide, exact[16:48], rtol=0, atol=3e-7 * largest)
        saved = open_checkpoint(base).tensors[name].array()
        assert np.abs(exact - saved).max() <= np.abs(saved).max() * (0.01 if kind == "Q8_0" else 0.12)
    tensors = loaded_tensors(checkpoint, "auto", "cpu")
    assert ("head" in tensors) == (codes is not None), "as codes, beside an embedding that is looked up"
    assert isinstance(tensors["embed"], WideTensor) == kind.startswith("Q")
    model.generate([5, 6, 7], max_new_tokens=4)


def test_blocks_of_one_number(tmp_path: Path) -> None:
    """Whose scale is 0: all are the minimum."""
    base = write_checkpoint(tmp_path / "base", **WIDE, family="stable_diffcoder")
    metadata, tensors = parts_of(base, "stable_diffcoder", "Q4_1")
    kind, shape, data = tensors["blk.0.ffn_up.weight"]
    block = np.array([0, -1.5], "<f2").tobytes() + bytes(range(16))
    tensors["blk.0.ffn_up.weight"] = kind, shape, block + bytes(20) + data[40:]
    tensor = open_checkpoint(write_gguf(tmp_path / "x.gguf", metadata, tensors)).tensors["layers.0.up"]
    codes, scales, zeros = tensor.rows(0, 1)
    values = ((codes - np.repeat(zeros, 32, 1)) * np.repeat(scales, 32, 1))[0]
    assert (values[:32] == -1.5).all() and (values[32:64] == 0).all()
    np.testing.assert_array_equal(tensor.float32(0, 1)[0, :64], values[:64])


def test_codes_after_a_merge_have_the_files_form(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", **WIDE, family="stable_diffcoder")
    adapter = write_adapter(tmp_path / "adapter", products(base, {"up_proj": 4, "q_proj": 4}, std=0.02))
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q6_K"):
        file = write(base, tmp_path / f"{kind}.gguf", "stable_diffcoder", kind)
        checkpoint = open_checkpoint(file, adapter)
        widened = loaded_tensors(checkpoint, "auto", "cpu")
        for name, tensor in loaded_tensors(checkpoint, "auto", "cpu", "codes").items():
            if name not in checkpoint.changes:
                assert tensor is checkpoint.tensors[name]
                continue
            plain = checkpoint.tensors[name].float32(0, tensor.shape[0])
            exact = tensor.float32(0, tensor.shape[0])
            delta = checkpoint.changes[name].product.delta(0, tensor.shape[0])
            np.testing.assert_array_equal(exact, plain + delta)
            np.testing.assert_array_equal(exact, widened[name].float32(0, tensor.shape[0]))
            if kind != "Q6_K":
                codes, scales, zeros = tensor.rows(0, tensor.shape[0])
                wide, offset = np.repeat(scales, 32, 1), 0 if zeros is None else np.repeat(zeros, 32, 1)
                # Half a step; symmetric int4 has none for what is opposite to the outermost.
                steps = {"Q8_0": 0.51, "Q4_0": 1.01, "Q4_1": 0.52}[kind]
                assert np.all(np.abs((codes - offset) * wide - exact) <= np.abs(wide) * steps)
        assert inspection(checkpoint, "cpu")["adapter"]["merged_in"] == ["float16"]
        merged = inspection(checkpoint, "cpu", merge="codes")["adapter"]["merged_in"]
        assert merged == [{"Q8_0": "int8", "Q6_K": "float16"}.get(kind, "int4")]
        for merge in ("dtype", "codes"):
            losart.load(file, "cpu", adapter=adapter, merge=merge).generate([5, 6], max_new_tokens=4)


def test_rows_that_are_replaced_leave_the_heads_other_codes_alone(bases: Any, tmp_path: Path) -> None:
    file = write(bases["sdar"], tmp_path / "x.gguf", "sdar", "Q8_0")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    row = np.random.default_rng(0).normal(0, 1, (1, 64)).astype(np.float32)
    adapter = write_adapter(tmp_path / "a", {name: row}, target_modules=[], trainable_token_indices=[315])
    checkpoint = open_checkpoint(file, adapter)
    tensors = loaded_tensors(checkpoint, "auto", "cpu")
    np.testing.assert_array_equal(float32_of(tensors["embed"], 315, 316), row)
    before, after = (head.rows(300, 320) for head in (checkpoint.tensors["embed"].codes, tensors["head"]))
    for one, other in zip(before[:2], after[:2], strict=True):
        np.testing.assert_array_equal(np.delete(one, 15, 0), np.delete(other, 15, 0))
    assert np.abs(after[0][15] * np.repeat(after[1][15], 32) - row[0]).max() <= np.abs(row).max() / 250


def test_an_ordinary_file_that_an_adapter_was_trained_to_fill_in_blocks(bases: Any, tmp_path: Path) -> None:
    base, rng = bases["stable_diffcoder"], np.random.default_rng(0)
    more = {"losart.family": ..., "losart.block_length": ..., "tokenizer.ggml.mask_token_id": ...}
    file = write(base, tmp_path / "model.gguf", "stable_diffcoder", **more)
    with pytest.raises(ConfigError, match=r"model\.gguf: general\.architecture 'llama' predicts the next"):
        open_checkpoint(file)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    row = rng.normal(0, 1, (1, 64)).astype(np.float32)
    tensors = products(base, {"_proj": 4}) | {name: row}
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=[315])
    conversion = {"family": "Fast_dLLM_Qwen", "block_length": 8, "mask_token_id": 315}
    (adapter / "losart.json").write_text(json.dumps(conversion))
    checkpoint = open_checkpoint(file, adapter)
    assert checkpoint.config.decoding.shifted and checkpoint.config.block_length == 8
    # The same adapter over the directory: rows of queries and keys are those that it was trained for.
    keys = json.loads((base / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    directory = tmp_path / "directory"
    directory.mkdir()
    for one in base.iterdir():
        (directory / one.name).write_bytes(one.read_bytes())
    (directory / "config.json").write_text(json.dumps(keys))
    prompt, options = list(range(20, 41)), {"max_new_tokens": 16, "threshold": 0.3, "stop_token_ids": []}
    one, other = (
        losart.generate(path, prompt, device="cpu", adapter=adapter, **options) for path in (file, directory)
    )
    assert one.token_ids == other.token_ids


def test_inspect_says_whether_it_fits(bases: Any, tmp_path: Path) -> None:
    facts = inspection(open_checkpoint(write(bases["sdar"], tmp_path / "a.gguf", "sdar", "Q4_1")), "cpu")
    assert facts["path"].endswith("a.gguf") and facts["tokenizer"] and facts["chat_template"]
    assert facts["dtype_on_disk"] == ["float32", "int4", "q4_1"] and facts["dtype"] == "float16"
    assert facts["matrix_bytes"].keys() == {"float16", "int4"} and facts["fitting_positions"]


def test_weights_are_not_rounded_twice(bases: Any, tmp_path: Path) -> None:
    file = write(bases["sdar"], tmp_path / "a.gguf", "sdar", "Q8_0")
    with pytest.raises(OptionError, match=r"a\.gguf: is quantized"):
        losart.load(file, "cpu", weights="int4")
    with pytest.raises(OptionError, match=r"a\.gguf: is a GGUF file; quantize the checkpoint"):
        quantize_checkpoint(open_checkpoint(file), tmp_path / "new", WeightFormat("int8"))
    file = write(bases["sdar"], tmp_path / "b.gguf", "sdar", "F16")
    assert losart.load(file, "cpu", weights="int8").weights == ("float16", "int8")


# -- the header


def test_all_types_of_values(tmp_path: Path) -> None:
    numbers = {0: ("B", 200), 1: ("b", -5), 2: ("H", 60000), 3: ("h", -6), 4: ("I", 1 << 31), 5: ("i", -7)}
    numbers |= {6: ("f", 0.5), 10: ("Q", 1 << 60), 11: ("q", -(1 << 60)), 12: ("d", 0.1)}
    keys = [(f"k{kind}", kind, struct.pack(f"<{format}", value)) for kind, (format, value) in numbers.items()]
    keys += [("yes", 7, b"\1"), ("text", 8, text("ü")), ("no", 9, struct.pack("<IQ2B", 7, 2, 0, 1))]
    head = b"".join(text(key) + struct.pack("<I", kind) + data for key, kind, data in keys)
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + head)
    metadata, tensors = read_gguf(file)
    expected = {f"k{kind}": value for kind, (_, value) in numbers.items()}
    assert metadata.values == expected | {"yes": True, "text": "ü", "no": [False, True]} and not tensors


FLAT = np.full(8, 3, "<f4").tobytes()
KEYS = {"general.architecture": "llama", "x": "y"}
ONE = {"a": (0, (2, 4), bytes(32)), "b": (1, (4,), bytes(8))}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 1}, "GGUF version 1 is not supported"),
        ({"version": 0x03000000}, "GGUF version 50331648 is not supported"),
        ({"counts": (1 << 60, 2)}, "the header: the file has no room for 1152921504606846976 of them"),
        ({"counts": (2, 1 << 60)}, "the header: the file has no room for 1152921504606846976 of them"),
        ({"counts": (9, 2)}, "the file has no room for 9 of them|ends within it|tensor '"),
        ({"keys": {"general.alignment": 3}}, "general.alignment must be a power of two"),
        ({"keys": {"general.alignment": 0}}, "general.alignment must be a power of two"),
        ({"keys": {"general.alignment": "32"}}, "general.alignment must be an integer"),
        ({"keys": {"split.count": 4}}, "is one of 4 files"),
        ({"keys": {"x": b"\xff\xfe"}}, "metadata key 'x': not UTF-8 text"),
        ({"offsets": {"a": 1 << 60}}, "tensor 'a' does not fit into the file"),
        ({"offsets": {"b": 36}}, "tensor 'b' begins at 36, which is no multiple of 32"),
        ({"offsets": {"b": 0}}, "tensors '[ab]' and '[ab]' overlap"),
        ({"tensors": ONE | {"b": (0, (1 << 31, 1 << 31), b"")}}, "tensor 'b' does not fit into the file"),
        (
            {"tensors": ONE | {"b": (99, (4,), bytes(8))}},
            "tensor 'b' has the type 99, which is not",
        ),
        ({"tensors": ONE | {"b": (13, (256,), bytes(8))}}, "tensor 'b' has the type Q5_K"),
        (
            {"tensors": ONE | {"b": (2, (4, 20), bytes(8))}},
            r"'b' has the shape \[4, 20\], not of blocks",
        ),
        ({"tensors": ONE | {"b": (1, (4, 0), b"")}}, r"'b' has the shape \[4, 0\]"),
        ({"tensors": ONE | {"b": (1, (1,) * 5, bytes(2))}}, "tensor 'b': 5 dimensions are not 1 to 4"),
        ({"tensors": ONE | {"b": (1, (), bytes(2))}}, "tensor 'b': 0 dimensions are not 1 to 4"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    keys, tensors = KEYS | changes.pop("keys", {}), changes.pop("tensors", ONE)
    file = write_gguf(tmp_path / "x.gguf", keys, tensors, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=rf"x\.gguf: .*({says})|x\.gguf: {says}"):
        read_gguf(file)


def test_a_large_file_of_nothing(tmp_path: Path) -> None:
    """Lengths that the file has room for, but nobody needs."""
    file = tmp_path / "x.gguf"
    for at, number in ((8, 1 << 20), (16, 1 << 20), (24, 1 << 30)):
        head = bytearray(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 0))
        head[at : at + 8] = struct.pack("<Q", number)
        with file.open("wb") as stream:
            stream.write(head)
            stream.truncate(1 << 31)
        with pytest.raises(CheckpointError, match=r"x\.gguf: .*more than"):
            read_gguf(file)


def test_names_that_are_there_twice(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"aa": 1, "ab": 2}, {"ta": ONE["a"], "tb": ONE["b"]})
    content = file.read_bytes()
    file.write_bytes(content.replace(b"ab", b"aa"))
    with pytest.raises(CheckpointError, match=r"x\.gguf: .*metadata key 'aa': is there twice"):
        read_gguf(file)
    file.write_bytes(content.replace(b"tb", b"ta"))
    with pytest.raises(TensorError, match=r"x\.gguf: tensor 'ta' is there twice"):
        read_gguf(file)


@pytest.mark.parametrize("kind", [4, 8, 9])
def test_arrays_of_2_to_the_60(tmp_path: Path, kind: int) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"x": b""}, {})
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + struct.pack("<IIQ", 9, kind, 1 << 60)
    file.write_bytes(head + bytes(64))
    with pytest.raises(CheckpointError, match=r"metadata key 'x': (the file has no room|arrays of type 9)"):
        read_gguf(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf: cannot be read"):
        open_checkpoint(tmp_path / "nowhere.gguf")
    file = tmp_path / "x.gguf"
    for content in (b"", b"GGU", b"GGUF", b"GGUF\3\0\0\0", b"\0" * 100, b"{}"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            open_checkpoint(str(file))


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", KEYS | {"y": ["a", "b"], "z": np.arange(3, dtype=np.int32)}, ONE)
    content = file.read_bytes()
    for length in range(len(content) - 24):  # the end pads the last tensor
        file.write_bytes(content[:length])
        with pytest.raises(LosartError, match=r"x\.gguf"):
            read_gguf(file)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_an_error_of_ours_or_none(small: Path, data: st.DataObject) -> None:
    """Anywhere in the header; all that opens is read."""
    kind = data.draw(st.sampled_from(["F32", "Q8_0", "Q4_1"]))
    with tempfile.TemporaryDirectory() as folder:
        file = write(small, Path(folder, "x.gguf"), "stable_diffcoder", kind)
        content = bytearray(file.read_bytes())
        last = content.index(b"output_norm.weight") + 80
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        try:
            checkpoint = open_checkpoint(file)
            for tensor in checkpoint.tensors.values():
                if len(tensor.shape) == 2:
                    float32_of(tensor, 0, tensor.shape[0])
            if checkpoint.tokenizer is not None:
                checkpoint.tokenizer.encode("Why?")
        except LosartError as error:
            assert "x.gguf" in str(error)


# -- metadata and tensors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": ...}, "missing key 'general.architecture'"),
        (
            {"general.architecture": "gemma"},
            "general.architecture 'gemma' is not supported; supported: ll",
        ),
        ({"llama.block_count": ...}, "missing key 'llama.block_count'"),
        ({"llama.block_count": "2"}, "llama.block_count must be an integer from 1"),
        ({"llama.block_count": -1}, "llama.block_count must be an integer from 1"),
        (
            {"llama.attention.head_count": np.array([4, 4], np.int32)},
            "must be an integer .*array of 2",
        ),
        ({"llama.attention.head_count_kv": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"llama.attention.layer_norm_rms_epsilon": ...}, "missing key 'llama.attention.layer_norm_rms_eps"),
        ({"llama.attention.layer_norm_rms_epsilon": 2.0}, "rms_norm_eps must be a number above 0"),
        ({"llama.attention.value_length": 32}, "value_length must be the width of a head, 16, not 32"),
        ({"llama.rope.dimension_count": 8}, "dimension_count must be the width of a head, 16, not 8"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base must be a finite number"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type must be 'none', 'linear' or 'yarn'"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor is not supported"),
        ({"llama.rope.freq_base": 0.5}, "llama.rope.freq_base must be larger than 1, not 0.5"),
        ({"llama.rope.scaling.type": "linear"}, "missing key 'llama.rope.scaling.factor'"),
        ({"llama.expert_count": 8}, "llama.expert_count is not supported"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window is not supported"),
        ({"losart.family": "gpt"}, "losart.family must be one of .*, not 'gpt'"),
        ({"losart.block_length": ...}, "missing key 'losart.block_length'"),
        ({"tokenizer.ggml.mask_token_id": ...}, "missing key 'tokenizer.ggml.mask_token_id'"),
        ({"tokenizer.ggml.mask_token_id": 264}, "token id 264 of the configuration is outside"),
        ({"diffusion.shift_logits": True}, "shift_logits must be false, as of losart.family 'stable_diffc"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model must be 'gpt2', .*not 'llama'"),
        ({"tokenizer.ggml.pre": "unknown"}, "tokenizer.ggml.pre must be one of gpt-2, "),
        ({"tokenizer.ggml.pre": ...}, "missing key 'tokenizer.ggml.pre'"),
        ({"tokenizer.ggml.tokens": 3}, "tokenizer.ggml.tokens must be an array of strings"),
        ({"tokenizer.ggml.merges": ...}, "missing key 'tokenizer.ggml.merges'"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges must be pairs of tokens, not 'a b c'"),
        ({"tokenizer.ggml.merges": ["a zzz"]}, "not a sound tokenizer: "),
        ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, "token_type must be one for each of"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": ...}, "tokens has a token twice"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template must be a string"),
    ],
)
def test_metadata_that_is_refused(small: Path, tmp_path: Path, changes: Any, says: str) -> None:
    file = write(small, tmp_path / "x.gguf", "stable_diffcoder", **changes)
    with pytest.raises((ConfigError, CheckpointError), match=rf"x\.gguf: .*{says}|x\.gguf: {says}"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"blk.0.ffn_up.weight": ...}, r"missing tensors: 'blk\.0\.ffn_up\.weight'"),
        ({"token_embd.weight": ...}, r"missing tensor 'token_embd\.weight'"),
        ({"blk.1.ffn_up.weight": (0, (2, 2), bytes(16))}, r"unknown tensors: 'blk\.1\.ffn_up\.weight'"),
        (
            {"blk.0.ffn_up.weight": (0, (31, 32), bytes(4 * 31 * 32))},
            r"'blk\.0\.ffn_up\.weight' has the sh",
        ),
        ({"output_norm.weight": (8, (32,), bytes(34))}, "'output_norm.weight' is a vector in q8_0"),
        (
            {"rope_freqs.weight": (0, (8,), bytes(32))},
            "factor must|is not Llama 3's scaling",
        ),
        ({"rope_freqs.weight": (0, (8,), FLAT)}, "'rope_freqs.weight': is not Llama 3's scaling"),
        ({"rope_freqs.weight": (0, (4,), bytes(16))}, "'rope_freqs.weight' must be 8 numbers in float32"),
    ],
)
def test_tensors_that_are_refused(small: Path, tmp_path: Path, changes: Any, says: str) -> None:
    metadata, tensors = parts_of(small, "stable_diffcoder")
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not ...}
    with pytest.raises((TensorError, ConfigError), match=rf"x\.gguf: .*{says}|x\.gguf: {says}"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", metadata, tensors))


def test_billions_of_layers_are_an_error_at_once(small: Path, tmp_path: Path) -> None:
    file = write(small, tmp_path / "x.gguf", "stable_diffcoder", **{"llama.block_count": (1 << 31) - 1})
    with pytest.raises(TensorError, match=r"x\.gguf: missing tensors: 'blk\.1\..*\.\.\."):
        open_checkpoint(file)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q6_K"])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    base = write_checkpoint(tmp_path / "base", **WIDE, family="stable_diffcoder")
    metadata, tensors = parts_of(base, "stable_diffcoder", kind)
    number, shape, data = tensors["blk.0.ffn_up.weight"]
    at = 208 if kind == "Q6_K" else 0
    data = data[:at] + np.array([np.inf], "<f2").tobytes() + data[at + 2 :]
    assert TYPES[kind] == number
    tensors["blk.0.ffn_up.weight"] = number, shape, data
    with pytest.raises(TensorError, match=r"'blk\.0\.ffn_up\.weight' has scales that are not finite"):
        losart.load(write_gguf(tmp_path / "x.gguf", metadata, tensors), "cpu")


ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (
        {"rope_type": "linear", "factor": 2.0},
        {"scaling.type": "linear", "scaling.factor": 2.0},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 1024},
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {},
    ),
}


@pytest.mark.parametrize("kind", list(ROPES))
def test_scaled_rotation(tmp_path: Path, kind: str) -> None:
    scaling, keys = ROPES[kind]
    sizes: dict[str, Any] = SMALL | {"rope_scaling": scaling, "head_dim": 64}
    base = write_checkpoint(tmp_path / "base", **sizes, family="stable_diffcoder")
    metadata, tensors = parts_of(base, "stable_diffcoder")
    metadata |= {f"llama.rope.{key}": value for key, value in keys.items()}
    expected = open_checkpoint(base).config.rope
    if kind == "llama3":
        plain, scaled = (inverse_frequencies(one, 64)[0] for one in (RopeConfig(expected.theta), expected))
        tensors["rope_freqs.weight"] = 0, (32,), (plain / scaled).astype("<f4").tobytes()
    assert open_checkpoint(write_gguf(tmp_path / "x.gguf", metadata, tensors)).config.rope == expected


def test_a_family_that_the_adapter_contradicts(small: Path, tmp_path: Path) -> None:
    file = write(small, tmp_path / "x.gguf", "stable_diffcoder")
    adapter = write_adapter(tmp_path / "adapter", products(small, {"q_proj": 4}))
    conversion = {"family": "sdar", "block_length": 8, "mask_token_id": 3}
    (adapter / "losart.json").write_text(json.dumps(conversion))
    with pytest.raises(ConfigError, match=r"losart\.json: family is 'sdar', .*'stable_diffcoder'"):
        open_checkpoint(file, adapter)
