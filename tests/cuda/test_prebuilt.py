"""Prebuilt kernels: what is built, when it is used, and that it never is for another source."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import losart.backends.cuda.prebuild
import losart.kernels_cu
from losart.backends.cuda.matmul_plans import matmul_plan
from losart.backends.cuda.plans import (
    attention_bits,
    causal_plan,
    masses_plan,
    prefix_plan,
    scores_plan,
    sparse_plan,
)
from losart.backends.cuda.prebuild import prebuild
from losart.backends.cuda.variants import CARDS, variants
from losart.cli import main
from losart.config.precision import Precision
from losart.errors import DeviceError
from losart.kernels_cu import FILES, compile_options, prebuilt, prebuilt_for, source
from losart.kernels_cu.compiler import ELF, compile_cubin, cubin_name, nvrtc_version
from losart.kernels_cu.prebuilt import prebuilt_counts, prebuilt_cubin, write_archive
from losart.loaders.model_config import read_model_config
from losart.measure.random_checkpoint import SIZES

KERNEL = ("source", "kernel.cu", ("-DN=1",), "sm_80")
BFLOAT16, FLOAT16 = Precision.of("bfloat16"), Precision.of("float16")
EMBEDDING = (source("embedding"), "embedding.cu", compile_options(BFLOAT16))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where prebuilt kernels are looked for."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "prebuilt")
    return tmp_path / "prebuilt"


@pytest.fixture
def fake_compiler(monkeypatch) -> None:
    def compile_cubin(*inputs):
        return ELF + repr(inputs).encode(), ""

    monkeypatch.setattr(losart.backends.cuda.prebuild, "compile_cubin", compile_cubin)


def test_only_the_very_same_is_found(folder):
    cubin = ELF + bytes(range(256)) * 10
    assert prebuilt_cubin(*KERNEL) is None and prebuilt_counts() == {}
    prebuilt._cubins.cache_clear()
    write_archive("sm_80", {cubin_name(*KERNEL): cubin}, folder)
    assert prebuilt_cubin(*KERNEL) == cubin
    assert prebuilt_counts() == {"sm_80": 1}
    for other in (
        ("other", *KERNEL[1:]),
        (*KERNEL[:2], ("-DN=2",), "sm_80"),
        (*KERNEL[:2], ("-DN=1", "-DN=2"), "sm_80"),
        (*KERNEL[:3], "sm_90a"),
    ):
        assert prebuilt_cubin(*other) is None


def test_same_kernels_make_the_same_archive(folder, tmp_path):
    cubins = {"b": ELF + b"2", "a": ELF + b"1"}
    first = write_archive("sm_80", cubins, folder)
    second = write_archive("sm_80", dict(sorted(cubins.items())), tmp_path / "other")
    assert first.read_bytes() == second.read_bytes()
    assert [*folder.iterdir()] == [first]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"something else" * 1000,
    ],
)
def test_damaged_archive_is_ignored_with_a_warning(folder, damage):
    path = write_archive("sm_80", {cubin_name(*KERNEL): ELF + bytes(range(256)) * 10}, folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"not used: .*sm_80.tar.xz cannot be read"):
        assert prebuilt_cubin(*KERNEL) is None
    assert prebuilt_cubin(*KERNEL) is None  # and says nothing again
    with pytest.warns(UserWarning, match="cannot be read"):
        assert prebuilt_counts() == {}


def test_a_kernel_is_taken_prebuilt_and_only_else_compiled(folder, fake_compiler, monkeypatch):
    prebuild(folder, ["sm_90a"], ["bfloat16"], ["embedding"])
    loaded = []
    device = SimpleNamespace(compute_capability="90")
    module = SimpleNamespace(load=loaded.append, get_function=lambda name: None)
    cuda = SimpleNamespace(
        Device=lambda number: device,
        function=SimpleNamespace(Module=lambda: module),
        runtime=SimpleNamespace(getDevice=lambda: 0, driverGetVersion=lambda: 13000),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(losart.kernels_cu, "Kernel", lambda *args: args[0])
    monkeypatch.setattr(losart.kernels_cu, "cached_cubin", lambda *inputs: b"compiled")
    make = losart.kernels_cu._kernel.__wrapped__
    make(0, "embedding", BFLOAT16, ())
    make(0, "embedding", FLOAT16, ())
    make(0, "query_change", BFLOAT16, ())
    assert loaded == [ELF + repr((*EMBEDDING, "sm_90a")).encode(), b"compiled", b"compiled"]


def test_changed_source_is_not_taken_prebuilt(folder, fake_compiler, monkeypatch):
    prebuild(folder, ["sm_90a"], ["float16"], ["embedding"])
    assert prebuilt_for((9, 0))
    assert not prebuilt_for((8, 0))
    monkeypatch.setattr(losart.kernels_cu, "source", lambda file: source(file) + "// changed")
    assert not prebuilt_for((9, 0))


def test_variants_are_those_of_the_released_models(read_config):
    """Whatever the released sizes launch, with blocks and active tokens up to 64, is a variant."""
    shipped = read_model_config(Path(losart.__file__).parent / "small_checkpoint", None)
    shapes = {(c.num_heads, c.num_kv_heads, c.head_dim) for c in (shipped, read_config())}
    shapes |= {(s["num_heads"], s["num_kv_heads"], s["head_dim"]) for s in SIZES.values() if s}
    matrices = {(1280, inner) for inner in (256, 768)}
    for s in filter(None, SIZES.values()):
        hidden, ffn, q = s["hidden_size"], s["intermediate_size"], s["num_heads"] * s["head_dim"]
        qkv = q + 2 * s["num_kv_heads"] * s["head_dim"]
        matrices |= {(qkv, hidden), (hidden, q), (2 * ffn, hidden), (hidden, ffn), (s["vocab_size"], hidden)}
    for card in CARDS.values():
        for precision in (Precision.of("float32"), BFLOAT16, Precision.of("float16", "int8")):
            known = {(name, defines) for name in FILES for defines in variants(name, card, precision)}
            tensor, kv_bits, launched = precision.weights.bits == 16, attention_bits(precision), set()
            for tokens in range(1, 65):
                launched.update(matmul_plan(card, tensor, tokens, *matrix) for matrix in matrices)
                for heads, kv_heads, dim in shapes:
                    shape = (card, kv_bits, tokens, heads, kv_heads, dim)
                    launched.update(plan(*shape) for plan in (prefix_plan, masses_plan))
                    launched.add(sparse_plan(*shape, 2560, 16, 80))
                    launched.add(scores_plan(card, kv_bits, tokens * heads // kv_heads, kv_heads, dim))
            for heads, kv_heads, dim in shapes:
                launched.add(causal_plan(card, kv_bits, 2048, heads, kv_heads, dim))
            launched.add(matmul_plan(card, tensor, 2048, 4096, 4096))
            assert {(plan.kernel, plan.defines) for plan in launched} <= known


def test_command_builds_every_variant(folder, fake_compiler, capsys, tmp_path):
    assert main(["prebuild", "--architectures", "sm_90a", "--output", str(folder)]) == 0
    card = CARDS["sm_90a"]
    expected = sum(len(variants(name, card, p)) for name, file in FILES.items() for p in file.precisions())
    assert f"sm_90a.tar.xz: {expected} kernels, " in capsys.readouterr().out
    assert prebuilt_counts() == {"sm_90a": expected}
    assert main(["info"]) == 0
    assert f"prebuilt kernels {expected} for sm_90a" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--architectures", "sm_75"], 2, "architectures must be of sm_80, .*, not 'sm_75'"),
        (["--dtypes", "bfloat16,int8"], 2, "dtypes must be of .*, not 'int8'"),
        ([], 1, "no NVRTC"),
    ],
)
def test_command_says_what_is_wrong(capsys, monkeypatch, folder, options, code, says):
    def no_nvrtc():
        raise DeviceError("there is no NVRTC")

    monkeypatch.setattr("losart.kernels_cu.compiler.nvrtc_version", no_nvrtc)
    assert main(["prebuild", "--output", str(folder), *options]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("losart: .*" + says, line)
    assert not folder.exists()


def test_prebuilt_kernels_are_the_compilers(folder):
    try:
        nvrtc_version()
    except DeviceError as error:
        pytest.skip(str(error))
    done = []
    archives = prebuild(
        folder,
        ["sm_80", "sm_90a"],
        ["bfloat16"],
        ["embedding", "query_change"],
        progress=lambda *counts: done.append(counts),
    )
    assert archives == {folder / "sm_80.tar.xz": 2, folder / "sm_90a.tar.xz": 2}
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert prebuilt_cubin(*EMBEDDING, "sm_90a") == compile_cubin(*EMBEDDING, "sm_90a")[0]
    assert prebuilt_cubin(*EMBEDDING, "sm_86") is None
