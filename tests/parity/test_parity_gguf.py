"""GGUF files that the gguf package writes: their numbers are its own, and their logits transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("gguf", reason="the oracle needs gguf")

import family_oracles
import gguf
import oracle
import transformers
from gguf_files import ARCHITECTURES, NAMES, parts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import with_plain_weights
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import losart
from losart.backends.cpu.convert import float32_of
from losart.loaders.gguf.reader import Metadata, read_gguf
from losart.loaders.gguf.tensors import tensor_of
from losart.loaders.gguf.tokenizer import read_tokenizer
from losart.measure.random_checkpoint import write_checkpoint

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

KINDS = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")}
KINDS |= {name: gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q6_K")}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "head_dim": 16}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("ordered", [False, True])
def test_numbers_are_the_packages_bit_for_bit(tmp_path: Path, kind: str, ordered: bool) -> None:
    """Of any bytes whose scales are finite."""
    numbers, nbytes = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (24, 3, nbytes), dtype=np.uint8)
    if numbers == 1:
        raw = rng.normal(0, 1, (24, 3 * 32)).astype(np.float32)
        raw = gguf.quantize(raw, KINDS[kind]).view(np.uint8)
    else:
        for at in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
            halves = rng.normal(0, 1, (24, 3)).astype(np.float16)
            halves[rng.random((24, 3)) < 0.1] = 0
            halves[rng.random((24, 3)) < 0.1] = 6e-8
            raw[:, :, at : at + 2] = halves.view(np.uint8).reshape(24, 3, 2)
        raw = raw.reshape(24, -1)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=KINDS[kind])
    write(writer)
    expected = gguf.dequantize(gguf.GGUFReader(tmp_path / "x.gguf").tensors[0].data, KINDS[kind])
    order = rng.permutation(24) if ordered else None
    expected = expected if order is None else expected[order]
    for looked_up in (False, True):
        tensor = tensor_of(read_gguf(tmp_path / "x.gguf")[1]["x"], order, looked_up)
        for start, stop in ((0, 24), (5, 9)):
            found = float32_of(tensor, start, stop)
            assert np.array_equal(found.view(np.uint32), expected[start:stop].view(np.uint32))


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(base: Path, folder: Path, family: str, kind: str, decoded_as: str | None) -> tuple[Path, Path]:
    """A checkpoint as a GGUF file, and as a directory of the numbers that this stands for."""
    metadata, _ = parts_of(base, family)
    metadata["losart.family"] = decoded_as or family
    metadata["losart.block_length"] = 8
    architecture = ARCHITECTURES[family]
    config = json.loads((base / "config.json").read_text())
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in metadata.items():
        if key == "general.architecture" or isinstance(value, (list, np.ndarray)):
            continue
        if isinstance(value, str):
            writer.add_string(key, "none" if key == "tokenizer.ggml.model" else value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    tensors = {}
    for name, values in load_file(base / "model.safetensors").items():
        parts = name.split(".")
        layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        module, end = name.removeprefix(f"model.layers.{parts[2]}." if layer else "").rsplit(".", 1)
        of = KINDS[kind] if values.ndim == 2 else KINDS["F32"]
        data = gguf.quantize(values, of)
        # What it stands for, before rows are where llama.cpp wants them.
        tensors[name] = gguf.dequantize(data, of).reshape(values.shape).astype(np.float32)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(NAMES[module])
        if architecture == "llama" and heads:
            n = config[heads]
            data = data.reshape(n, 2, len(data) // n // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(f"{layer}{NAMES[module]}.{end}", data, raw_dtype=of)
    write(writer)
    widened = folder / "widened"
    shutil.copytree(base, widened)
    save_file(tensors, widened / "model.safetensors")
    return file, widened


CASES = {
    "llama, F32": ("stable_diffcoder", "F32", None, {}),
    "llama, Q8_0, tied": ("stable_diffcoder", "Q8_0", None, {"tied": True}),
    "llama, Q4_1, shifted": ("stable_diffcoder", "Q4_1", "Fast_dLLM_Qwen", {"tied": True}),
    "llama, bias": ("stable_diffcoder", "F16", None, {"bias": True}),
    "qwen2, Q4_0": ("Fast_dLLM_Qwen", "Q4_0", None, {}),
    "qwen2, BF16": ("Fast_dLLM_Qwen", "BF16", None, {"tied": True}),
    "qwen3, Q4_1": ("sdar", "Q4_1", None, {}),
    "qwen3, F16": ("sdar", "F16", None, {"tied": True}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_logits_and_generations_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    """With matrices as numbers: for codes activations are rounded, which the oracle does not do."""
    family, kind, decoded_as, more = CASES[case]
    base = write_checkpoint(tmp_path / "base", family=family, **SMALL, **more)
    file, widened = convert(base, tmp_path, family, kind, decoded_as)
    model = losart.load(file, "cpu", "float32")
    assert len(model.weights) == (2 if kind.startswith("Q") else 1)
    if kind.startswith("Q"):
        model = with_plain_weights(model)
    theirs = oracle.load(widened) if family == "sdar" else family_oracles.load(widened)
    forward = family_oracles.forward_of(theirs)
    options: dict[str, Any] = {"block_length": 8, "confidence_threshold": 0.3}
    family_oracles.check_logits(model, forward, (9, 24), 8, **options)
    if (decoded_as or family) == "Fast_dLLM_Qwen":
        prompt = np.random.default_rng(3).integers(6, 250, 21).tolist()
        given = {"block": 8, "sub_block": 4, "threshold": 0.3, "mask_id": model.config.mask_token_id}
        expected = family_oracles.fast_dllm(forward, prompt, 20, **given)
        own = {"small_block_size": 4, "top_p": 1.0, "stop_token_ids": []}
        assert model.generate(prompt, max_new_tokens=20, **options, **own).token_ids == expected


# -- tokenizers

WORDS = (
    "the cat sat on the mat, and isn't it 1234567 fine? ÄÖÜ café 漢字 don't \n\n\t x=3.14;  def f(a):\n   "
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]


def their_tokenizer(pre: str) -> Any:
    """A tokenizer of transformers, trained on a few words, as models of that kind have it."""
    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    first: list[Any] = []
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif pre != "gpt-2":
        pattern = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|") if pre == "llama-bpe" else QWEN
        first = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([WORDS, WORDS[::-1], WORDS * 2], trainer)
    if pre == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
        )
    return backend


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "qwen2", "llama-bpe"])
def tokenizers_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, backend = tmp_path_factory.mktemp("tokenizer"), their_tokenizer(request.param)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[2], mask_token=SPECIAL[3]
    )
    fast.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocab = saved["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(request.param)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    for name, number in (("bos", 0), ("eos", 2), ("mask", 3)):
        getattr(writer, f"add_{name}_token_id")(number)
    write(writer)
    ours = read_tokenizer(Metadata(folder / "x.gguf", read_gguf(folder / "x.gguf")[0].values))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.sampled_from([*WORDS.split(" "), " ", "\n", "  ", *SPECIAL, "12", "'LL"])).map("".join)
)
def test_tokens_are_those_of_transformers(tokenizers_of: Any, text: str) -> None:
    ours, theirs = tokenizers_of
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids, skip_special=False) == theirs.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
