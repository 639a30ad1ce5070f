"""`losart info` and `losart inspect`: facts about this machine and about a checkpoint."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from adapters import products, write_adapter
from gguf_files import parts_of, write_gguf
from safetensors.numpy import load_file
from test_device import CUDARuntimeError, no_nvrtc

import losart
import losart.backends
import losart.measure.environment
from losart.backends.cpu.backend import CpuBackend, available_bytes
from losart.cli import main
from losart.cli.tables import size
from losart.config.precision import FORMATS
from losart.engine.kv_cache import PagedKVCache
from losart.loaders import safetensors_files

# info


def info(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["info", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


@pytest.fixture
def without_nvrtc(monkeypatch):
    for module in (losart.backends, losart.measure.environment):
        monkeypatch.setattr(module, "nvrtc_version", no_nvrtc)


def test_info(capsys, monkeypatch, tmp_path, without_nvrtc):
    monkeypatch.setenv("LOSART_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cupy", None)
    facts = info(capsys)
    assert facts["losart"] == losart.__version__
    assert facts["cpu"]["threads"] >= 1 and facts["cpu"]["name"]
    assert facts["cpu"]["vectors"].partition(" with ")[0] in ("AVX-512", "AVX2", "SSE2", "NEON", "plain")
    assert (facts["gpu"], facts["cupy"], facts["nvrtc"]) == (None, None, None)
    assert "losart[cuda12x]" in facts["cuda_problem"]
    assert facts["kernel_cache"] == {"folder": str(tmp_path / "kernels"), "files": 0, "bytes": 0}

    (tmp_path / "kernels").mkdir()
    for name, count in (("a.cubin", 300), ("b.cubin", 700), ("other", 5)):
        (tmp_path / "kernels" / name).write_bytes(bytes(count))
    assert info(capsys)["kernel_cache"]["files"] == 2
    assert info(capsys)["kernel_cache"]["bytes"] == 1000
    assert main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "CPU holds weights in float32, bfloat16, float16, int4, int8; keys and values in float32," in text
    assert "2 files, 1000 bytes" in text and "GPU none not used: CuPy is not installed" in text


def fails(*_: object) -> None:
    raise CUDARuntimeError("CUDA driver version is insufficient")


def fake_cupy(**changes: object) -> SimpleNamespace:
    runtime = {
        "CUDARuntimeError": CUDARuntimeError,
        "getDeviceCount": lambda: 1,
        "getDeviceProperties": lambda number: {"name": b"NVIDIA H200", "totalGlobalMem": 150 << 30},
        "driverGetVersion": lambda: 12080,
    }
    device = SimpleNamespace(id=0, compute_capability="90")
    cuda = SimpleNamespace(runtime=SimpleNamespace(**runtime | changes), Device=lambda: device)
    return SimpleNamespace(__version__="14.1.0", cuda=cuda)


def test_info_of_a_gpu(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    for module in (losart.backends, losart.measure.environment):
        monkeypatch.setattr(module, "nvrtc_version", lambda: (12, 9))
    facts = info(capsys)
    gpu = facts["gpu"]
    assert (gpu["name"], gpu["memory_bytes"], gpu["capability"]) == ("NVIDIA H200", 150 << 30, "9.0")
    assert (gpu["driver_cuda"], facts["cupy"], facts["nvrtc"]) == ("12.8", "14.1.0", "12.9")
    assert facts["cuda_problem"] is None
    assert main(["info"]) == 0
    assert "NVIDIA H200, 150.0 GiB, compute capability 9.0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("call", ["getDeviceCount", "getDeviceProperties", "driverGetVersion"])
@pytest.mark.parametrize("error", [CUDARuntimeError, OSError, AttributeError])
def test_info_where_cuda_is_broken(capsys, monkeypatch, without_nvrtc, call, error):
    def broken(*_: object) -> None:
        raise error("something is broken")

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**{call: broken}))
    monkeypatch.setattr(losart.backends, "prebuilt_for", lambda capability: False)
    facts = info(capsys)
    assert facts["cupy"] == "14.1.0"
    assert facts["cuda_problem"] and (facts["gpu"] is None or call == "getDeviceCount")
    assert main(["info"]) == 0


def test_info_without_a_home_directory(capsys, monkeypatch):
    monkeypatch.setattr(losart.measure.environment, "cache_folder", lambda: None)
    assert info(capsys)["kernel_cache"] is None
    assert main(["info"]) == 0
    assert "there is no home directory" in capsys.readouterr().out


# inspect


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["inspect", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_says_what_an_adapter_and_a_gguf_file_are(make_checkpoint, tmp_path, capsys):
    base = make_checkpoint(family="stable_diffcoder", hidden_size=64, intermediate_size=64)
    more = {"losart.family": ..., "losart.block_length": ...}
    file = write_gguf(tmp_path / "model.gguf", *parts_of(base, "stable_diffcoder", "Q4_1", **more))
    adapter = write_adapter(tmp_path / "adapter", products(base, {"_proj": 4}))
    (adapter / "losart.json").write_text(
        json.dumps({"family": "Fast_dLLM_Qwen", "block_length": 8, "mask_token_id": 315})
    )
    assert main(["inspect", str(file), "--device", "cpu"]) == 1
    assert "model.gguf: general.architecture 'llama' predicts the next token" in capsys.readouterr().err
    assert main(["inspect", str(file), "--device", "cpu", "--adapter", str(adapter)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "architecture llama, which fills in blocks as Fast_dLLM_Qwen" in text
    assert f"adapter {adapter}: 7 matrices by products of rank 4, merged in float16" in text
    command = ["generate", str(file), "--device", "cpu", "--adapter", str(adapter), "--max-new-tokens", "8"]
    assert main([*command, "--prompt", "Why?"]) == 0


def test_inspect_reads_no_weights(tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(safetensors_files.MappedTensor, "array", fails)
    assert main(["inspect", str(tiny_checkpoint)]) == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_inspect_is_what_the_files_and_the_model_are(make_checkpoint, capsys, bias, tied):
    path = make_checkpoint(tied=tied, bias=bias, block_length=8)
    facts = inspect(capsys, path)
    tensors = load_file(path / "model.safetensors").values()
    assert facts["parameters"] == sum(tensor.size for tensor in tensors)
    assert facts["bytes_on_disk"] == facts["weight_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert (facts["architecture"], facts["device"], facts["dtype"]) == ("sdar", "cpu", "float32")
    assert facts["dtype_on_disk"] == ["float32"]
    config = losart.load(path, "cpu").config
    expected = (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads)
    sizes = facts["sizes"]
    assert (sizes["layers"], sizes["hidden"], sizes["heads"], sizes["kv_heads"]) == expected
    assert (sizes["tied_embeddings"], sizes["qkv_bias"], sizes["o_bias"]) == (tied, bias, bias)
    assert (facts["block_length"], facts["tokenizer"], facts["chat_template"]) == (8, True, True)
    assert facts["mask_token"] == {"id": config.mask_token_id, "text": "<|MASK|>"}
    assert [token["text"] for token in facts["end_tokens"]] == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("kv", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_inspect_counts_what_is_held(make_checkpoint, capsys, monkeypatch, dtype, kv):
    path = make_checkpoint(max_positions=6000, num_layers=2)
    facts = inspect(capsys, path, "--dtype", dtype, "--kv", kv)

    held = []
    for name in ("upload", "upload_vector"):
        original = getattr(CpuBackend, name)

        def noting(backend, *tensors, original=original):
            array = original(backend, *tensors)
            held.extend(getattr(array, "matrices", [array]))
            return array

        monkeypatch.setattr(CpuBackend, name, noting)
    model = losart.load(path, "cpu", dtype, kv=kv)
    assert (facts["kv"], facts["matrix_bytes"]) == (model.kv, model.matrix_bytes)
    assert facts["weight_bytes"] == sum(array.nbytes for array in held)

    allocated = []
    new_cache = model._engine.runner.backend.new_cache(16, 6000)
    cache = PagedKVCache(
        new_cache.table,
        lambda shape, format: allocated.append(np.zeros(shape, format.array)) or allocated[-1],
    )
    for entry, context in zip(facts["kv_cache"], (4096, 6000), strict=True):
        cache.reserve(context)
        assert entry == {"context": context, "bytes": sum(array.nbytes for array in allocated)}
    # By hand: keys and values, and of 16 pages of 16, in float32, bounds, bases and steps, and 4-bit codes.
    config = model.config
    heads = config.num_layers * config.num_kv_heads
    key = config.head_dim * FORMATS[dtype].itemsize if kv == "auto" else config.head_dim + 4
    bounds = (16 * 2 + 2) * 4 + 16 * 2 // 2
    expected = heads * (6144 * 2 * key + 6144 // 256 * config.head_dim * bounds)
    assert facts["kv_cache"][1]["bytes"] == expected


def test_inspect_with_keys_and_values_in_8_bits(make_checkpoint, capsys):
    """About half of 16 bits; at 128 channels, as released models have, the scales are 3% of it."""
    path = make_checkpoint(dtype="bfloat16", head_dim=128)
    before, *others = (inspect(capsys, path, "--kv", kv) for kv in ("auto", "int8", "fp8"))
    (whole,) = before["kv_cache"]
    for facts, kv in zip(others, ("int8", "fp8"), strict=True):
        (held,) = facts["kv_cache"]
        assert (facts["kv"], facts["dtype"], held["context"]) == (kv, "bfloat16", whole["context"])
        assert 0.5 < held["bytes"] / whole["bytes"] < 0.65  # page bounds are as they were
        assert facts["weight_bytes"] == before["weight_bytes"]
    assert main(["inspect", str(path), "--device", "cpu", "--kv", "int8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    (held,) = others[0]["kv_cache"]
    assert f"KV at {held['context']} {size(held['bytes'])} in int8" in text


def test_inspect_says_how_quantized_weights_are_held(make_checkpoint, tmp_path, capsys):
    path = make_checkpoint(dtype="bfloat16")
    assert main(["quantize", str(path), str(tmp_path / "new"), "--weights", "int4", "--group", "16"]) == 0
    capsys.readouterr()
    facts = inspect(capsys, tmp_path / "new")
    assert list(facts["matrix_bytes"]) == facts["dtype_on_disk"] == ["bfloat16", "int4"]
    assert facts["matrix_bytes"] == losart.load(tmp_path / "new", "cpu").matrix_bytes
    assert main(["inspect", str(tmp_path / "new"), "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    held = ", ".join(f"{name} ({size(count)})" for name, count in facts["matrix_bytes"].items())
    assert f"weights {size(facts['weight_bytes'])} on cpu: {held} " in text


def test_inspect_options_are_those_of_a_generation(make_checkpoint, capsys):
    facts = inspect(capsys, make_checkpoint(block_length=None))
    assert facts["block_length"] is None
    options = facts["options"]
    assert (options["block_length"], options["denoising_steps"], options["attention"]) == (4, 4, "dense")
    model = losart.load(make_checkpoint(block_length=None), "cpu")
    assert model.generate([1, 2, 3], **options | {"max_new_tokens": 2}).token_ids


def test_inspect_without_tokenizer_and_mask_token(make_checkpoint, capsys):
    path = make_checkpoint(tokenizer=False, extra_config={"mask_token_id": None})
    facts = inspect(capsys, path)
    assert (facts["tokenizer"], facts["chat_template"], facts["mask_token"]) == (False, False, None)
    assert facts["options"] is None
    assert main(["inspect", str(path), "--device", "cpu"]) == 0
    assert "the mask token must be given" in " ".join(capsys.readouterr().out.split())


def test_inspect_says_whether_it_fits(tiny_checkpoint, capsys, monkeypatch):
    facts = inspect(capsys, tiny_checkpoint)
    assert facts["free_bytes"] > 1 << 20
    assert facts["fitting_positions"] == facts["sizes"]["positions"] == 4096
    for room in (1_000_000, 200_000, 1_000, 0, -1):
        free = facts["weight_bytes"] + room
        monkeypatch.setattr(CpuBackend, "free_bytes", lambda self, free=free: free)
        fits = inspect(capsys, tiny_checkpoint)["fitting_positions"]
        if room >= 0:
            of = inspect(capsys, tiny_checkpoint, "--context", *(n for n in (fits, fits + 1) if n))[
                "kv_cache"
            ]
            assert all((one["bytes"] <= room) == (one["context"] <= fits) for one in of)
        assert (fits is None) == (room < 0)
        assert main(["inspect", str(tiny_checkpoint), "--device", "cpu"]) == 0
        assert (f"yes, {size(free)} are free on cpu" if fits else "no, ") in capsys.readouterr().out
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: None)
    assert inspect(capsys, tiny_checkpoint)["fitting_positions"] is None
    assert main(["inspect", str(tiny_checkpoint), "--device", "cpu"]) == 0
    assert "unknown: " in capsys.readouterr().out


def test_memory_that_the_system_can_give(tmp_path):
    file = tmp_path / "meminfo"
    assert available_bytes(file, tmp_path) is None
    file.write_text("MemTotal:  8000 kB\nMemAvailable:    5000 kB\nBuffers: 1 kB\n")
    assert available_bytes(file, tmp_path) == 5000 << 10
    (tmp_path / "memory.current").write_text("1000000\n")
    for limit, free in (("max", 5000 << 10), ("3000000", 2000000), ("900000000", 5000 << 10)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert available_bytes(file, tmp_path) == free
    file.write_text("MemTotal:  8000 kB\n")
    (tmp_path / "memory.max").unlink()
    assert available_bytes(file, tmp_path) is None


def test_inspect_contexts(tiny_checkpoint, capsys):
    facts = inspect(capsys, tiny_checkpoint)
    assert [entry["context"] for entry in facts["kv_cache"]] == [4096]
    facts = inspect(capsys, tiny_checkpoint, "--context", 1, 256, 257)
    sizes = [entry["bytes"] for entry in facts["kv_cache"]]
    assert math.isclose(sizes[0], sizes[1]) and sizes[2] == 2 * sizes[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/such/directory"], 1, "no/such/directory"),
        (["CHECKPOINT", "--context", "4097"], 2, "context must be 1 to the model's 4096 positions"),
        (["CHECKPOINT", "--context", "0"], 2, "context"),
    ],
)
def test_mistakes_give_one_line_and_a_code(tiny_checkpoint, capsys, arguments, code, message):
    arguments = [str(tiny_checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert main(["inspect", *arguments, "--device", "cpu"]) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("losart: ") and error.count("\n") == 1
