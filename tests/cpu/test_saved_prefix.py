"""Prefixes in files: another process begins with them, and a file that is not sound changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_rows import model_by_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scarce_memory import ScarceMemory
from test_model_api import with_tensor

import losart
from losart import OptionError, OutOfMemoryError, PrefixError, PromptError
from losart.engine.saved_prefix import MAGIC, UNIT, read_facts

RANDOM = np.random.default_rng(9).integers(0, 256, 1200).tolist()
DOCUMENT = RANDOM[:700]


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> losart.Model:
    return model_by_rows(tiny_checkpoint)


def options(**changed: Any) -> dict[str, Any]:
    return {"block_length": 4, "stop_token_ids": [], "max_new_tokens": 10} | changed


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prefixes") / "document"
    assert losart.Engine(model).save_prefix(DOCUMENT, file, **options()) == 688
    return file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("block_length", "page_size"), [(4, 16), (7, 48)])
@pytest.mark.parametrize("attention", [{}, {"attention": "losa", "budget": 64}], ids=["dense", "losa"])
def test_a_prompt_goes_on_after_a_saved_prefix(
    tiny_checkpoint, tmp_path, dtype, block_length, page_size, attention
):
    model = model_by_rows(tiny_checkpoint, dtype)
    chosen = options(block_length=block_length, page_size=page_size, **attention)
    file, step = tmp_path / "document", np.lcm(block_length, page_size)
    assert losart.Engine(model).save_prefix(DOCUMENT, str(file), **chosen) == 700 // step * step
    engine = losart.Engine(model)
    assert engine.load_prefix(str(file)) == 700 // step * step
    for prompt in ([*DOCUMENT, *RANDOM[800:900]], [*DOCUMENT[:500], *RANDOM[:50]], RANDOM[300:400], DOCUMENT):
        common = 700 if prompt[:700] == DOCUMENT else 500 if prompt[:500] == DOCUMENT[:500] else 0
        found = engine.submit(prompt, **chosen).result()
        assert found.stats.reused_tokens == common // step * step
        assert found.token_ids == model.generate(prompt, **chosen).token_ids
    assert losart.Engine(model).load_prefix(file)
    assert [one.name for one in tmp_path.iterdir()] == ["document"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "kv"),
    [(dtype, "auto") for dtype in ("float32", "bfloat16", "float16")]
    + [("bfloat16", "int8"), ("bfloat16", "fp8"), ("float16", "int8")],
)
def test_a_prompt_goes_on_after_a_saved_prefix_on_cuda(tiny_checkpoint, tmp_path, dtype, kv):
    """As after one that the engine holds: there and in the file are the same bytes."""
    model, file = losart.load(tiny_checkpoint, "cuda", dtype, kv=kv), tmp_path / "document"
    engine = losart.Engine(model)
    assert engine.save_prefix(DOCUMENT, file, **options()) == 688
    prompt = [*DOCUMENT, *RANDOM[800:900]]
    expected = engine.submit(prompt, **options()).result()
    engine = losart.Engine(model)
    assert engine.load_prefix(file) == 688
    found = engine.submit(prompt, **options()).result()
    assert found.stats.reused_tokens == expected.stats.reused_tokens == 688
    assert found.token_ids == expected.token_ids
    with pytest.raises(PrefixError, match="was saved with device cuda"):
        losart.Engine(losart.load(tiny_checkpoint, "cpu", dtype, kv=kv)).load_prefix(file)


def test_another_process_begins_with_it(tiny_checkpoint, saved, model):
    program = """
import sys
import losart
engine = losart.Engine(losart.load(sys.argv[1], "cpu"))
engine.load_prefix(sys.argv[2])
prompt = eval(sys.argv[3])
result = engine.submit(prompt, block_length=4, stop_token_ids=[], max_new_tokens=10).result()
print(result.stats.reused_tokens, result.stats.prefilled_tokens, result.token_ids)
"""
    prompt = [*DOCUMENT, *RANDOM[800:820]]
    command = [sys.executable, "-W", "ignore", "-c", program, tiny_checkpoint, saved, str(prompt)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"688 32 {model.generate(prompt, **options()).token_ids}"


def test_what_is_held_or_saved_before_is_not_prefilled_again(model, tmp_path):
    engine = losart.Engine(model)
    engine.submit(RANDOM[:900], **options()).result()
    before = engine.stats.prefilled_tokens
    seen: list[Any] = []
    assert engine.save_prefix(
        DOCUMENT, tmp_path / "one", progress=lambda *done: seen.append(done), **options()
    )
    assert engine.stats.prefilled_tokens == before + 12 and seen == [(12, 12)]
    assert engine.save_prefix(DOCUMENT[:512], tmp_path / "two", **options()) == 512
    assert engine.stats.prefilled_tokens == before + 12 and len(seen) == 1
    assert losart.Engine(model).load_prefix(tmp_path / "two") == 512
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.kv_bytes_in_use) == (0, 0, 0)


def test_a_prefix_needs_no_room_for_stored_results(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model._engine.runner, "new_slot", None)
    chosen = options(attention="losa", budget=64)
    assert losart.Engine(model).save_prefix(DOCUMENT, tmp_path / "prefix", **chosen) == 688


def test_keys_and_values_after_a_prefix_are_not_saved(model, tmp_path):
    """They may be another generation's."""
    engine = losart.Engine(model)
    engine.submit(DOCUMENT, **options()).result()
    (held,) = engine._engine._pool._held
    assert held.chunks[1][0][:, :, :, 64:].any()
    engine.save_prefix(DOCUMENT[:320], tmp_path / "prefix", **options())
    engine = losart.Engine(model)
    engine.load_prefix(tmp_path / "prefix")
    (held,) = engine._engine._pool._held
    assert held.chunks[1][0][:, :, :, :64].any() and not held.chunks[1][0][:, :, :, 64:].any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damage_anywhere_is_found(model, saved, tmp_path_factory, data):
    whole = saved.read_bytes()
    file = tmp_path_factory.mktemp("damaged") / "prefix"
    if data.draw(st.booleans()):
        end = data.draw(st.one_of(st.integers(0, UNIT + 10), st.integers(0, len(whole) - 1)))
        file.write_bytes(whole[:end])
    else:
        # The beginning and the end have more kinds of bytes than their share.
        last = len(whole) - 1
        place = data.draw(st.one_of(st.integers(0, 40), st.integers(0, last), st.integers(last - 40, last)))
        changed = bytearray(whole)
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(changed)
    engine = losart.Engine(model)
    with pytest.raises(PrefixError, match=str(file)):
        engine.load_prefix(file)
    assert engine.stats.kv_bytes_held == 0
    engine.load_prefix(saved)
    with pytest.raises(PrefixError, match=str(file)):
        engine.load_prefix(file)
    assert engine.submit(DOCUMENT, **options()).result().stats.reused_tokens == 688


def test_files_that_are_something_else(model, saved, tmp_path):
    engine = losart.Engine(model)
    (tmp_path / "empty").touch()
    (tmp_path / "longer").write_bytes(saved.read_bytes() + b"\0")
    (tmp_path / "newer").write_bytes(MAGIC + b"\2" + saved.read_bytes()[9:])
    for name, message in (
        ("missing", "cannot be read"),
        (".", "cannot be read"),
        ("empty", "not a saved prefix"),
        ("longer", "is cut short or damaged"),
        ("newer", "has version 2 of the format"),
    ):
        with pytest.raises(PrefixError, match=message) as raised:
            engine.load_prefix(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)


def test_another_model_or_dtype(tiny_checkpoint, make_checkpoint, tmp_path):
    path, file = make_checkpoint(), tmp_path / "prefix"
    losart.Engine(losart.load(path, "cpu")).save_prefix(DOCUMENT, file, **options())
    assert losart.Engine(losart.load(path, "cpu")).load_prefix(file)
    with pytest.raises(PrefixError, match="was saved with dtype float32, and here it is bfloat16"):
        losart.Engine(losart.load(path, "cpu", "bfloat16")).load_prefix(file)

    def change(tensor: np.ndarray) -> np.ndarray:
        return tensor + np.float32(1e-3)

    other = with_tensor(path, "model.norm.weight", change)
    for checkpoint in (other, tiny_checkpoint):
        with pytest.raises(PrefixError, match="was saved with model"):
            losart.Engine(losart.load(checkpoint, "cpu")).load_prefix(file)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("attention", [{}, {"attention": "losa", "budget": 64}], ids=["dense", "losa"])
def test_a_prompt_goes_on_after_keys_and_values_in_8_bits(tiny_checkpoint, tmp_path, kv, attention):
    model = losart.load(tiny_checkpoint, "cpu", deterministic=True, kv=kv)
    file, chosen = tmp_path / "document", options(**attention)
    assert losart.Engine(model).save_prefix(DOCUMENT, file, **chosen) == 688
    engine = losart.Engine(model)
    assert engine.load_prefix(file) == 688
    prompt = [*DOCUMENT, *RANDOM[800:900]]
    found = engine.submit(prompt, **chosen).result()
    assert found.stats.reused_tokens == 688
    assert found.token_ids == model.generate(prompt, **chosen).token_ids


def test_keys_and_values_in_another_format(tiny_checkpoint, tmp_path):
    models = {kv: losart.load(tiny_checkpoint, "cpu", kv=kv) for kv in ("auto", "int8", "fp8")}
    for kv, model in models.items():
        losart.Engine(model).save_prefix(DOCUMENT, tmp_path / kv, **options())
    for saved, by in models.items():
        for kv, model in models.items():
            engine = losart.Engine(model)
            if kv == saved:
                assert engine.load_prefix(tmp_path / saved) == 688
                continue
            message = f"{saved}: was saved with kv {by.kv}, and here it is {model.kv}"
            with pytest.raises(PrefixError, match=message):
                engine.load_prefix(tmp_path / saved)
            assert engine.stats.kv_bytes_held == 0


def test_files_from_before_kv_are_of_the_dtype(tiny_checkpoint, tmp_path, monkeypatch):
    file, facts = tmp_path / "prefix", losart.Engine._facts
    with monkeypatch.context() as patch:
        patch.setattr(
            losart.Engine,
            "_facts",
            lambda self: {name: value for name, value in facts(self).items() if name != "kv"},
        )
        losart.Engine(losart.load(tiny_checkpoint, "cpu", "bfloat16")).save_prefix(
            DOCUMENT, file, **options()
        )
    assert b'"kv"' not in file.read_bytes()[:UNIT]
    assert read_facts(file)["kv"] == "bfloat16"
    assert losart.Engine(losart.load(tiny_checkpoint, "cpu", "bfloat16")).load_prefix(file) == 688
    for kv in ("int8", "fp8"):
        with pytest.raises(PrefixError, match=f"was saved with kv bfloat16, and here it is {kv}"):
            losart.Engine(losart.load(tiny_checkpoint, "cpu", "bfloat16", kv=kv)).load_prefix(file)


def test_mistakes(model, tmp_path):
    engine, file = losart.Engine(model), tmp_path / "prefix"
    with pytest.raises(PromptError, match="16 tokens are whole pages and blocks, and the prompt has 15"):
        engine.save_prefix(DOCUMENT[:15], file, **options())
    with pytest.raises(PromptError):
        engine.save_prefix([], file, **options())
    with pytest.raises(OptionError):
        engine.save_prefix(DOCUMENT, file, page_size=17)
    with pytest.raises(PrefixError, match="cannot be written"):
        engine.save_prefix(DOCUMENT, tmp_path / "missing" / "prefix", **options())
    assert not list(tmp_path.iterdir())


def test_an_old_file_stays_where_writing_fails(model, saved, tmp_path, monkeypatch):
    file = tmp_path / "prefix"
    file.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PrefixError, match="disk full"):
        losart.Engine(model).save_prefix(DOCUMENT, file, **options())
    assert file.read_bytes() == b"old" and [one.name for one in tmp_path.iterdir()] == ["prefix"]


def test_a_loaded_prefix_has_room_or_makes_it(model, saved, monkeypatch):
    chunk = model._engine.runner.backend.new_cache(16, 256).chunk_bytes
    with pytest.raises(OutOfMemoryError, match=f"takes {3 * chunk} bytes.* kv_memory is {2 * chunk}"):
        losart.Engine(model, kv_memory=2 * chunk).load_prefix(saved)
    engine = losart.Engine(model, kv_memory=4 * chunk)
    engine.submit(RANDOM[900:1150], **options(max_new_tokens=2)).result()
    engine.submit(RANDOM[500:700], **options()).result()
    engine.load_prefix(saved)
    assert engine.stats.kv_bytes_held == 4 * chunk
    assert engine.submit(DOCUMENT, **options()).result().stats.reused_tokens == 688
    with pytest.raises(OutOfMemoryError, match="generations under way may take"):
        other = losart.Engine(model, kv_memory=3 * chunk)
        stream = other.submit(RANDOM[:100], **options())
        next(stream)
        other.load_prefix(saved)
    assert stream.result().token_ids == model.generate(RANDOM[:100], **options()).token_ids


def test_what_is_mapped_is_never_written(model, saved, tmp_path):
    before, memory = saved.read_bytes(), ScarceMemory()
    engine = losart.Engine(model)
    engine.load_prefix(saved)
    engine.submit(DOCUMENT, **options()).result()
    engine.submit([*DOCUMENT, *RANDOM[700:]], **options()).result()
    assert saved.read_bytes() == before and not memory.refused
