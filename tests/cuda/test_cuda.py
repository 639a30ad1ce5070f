"""The CUDA backend against the CPU backend: whole models, and what a generation does to the device."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from adapters import products, write_adapter
from cuda_arrays import matmul_array
from gguf_files import parts_of, write_gguf
from passes import block_batch
from quantized import awq, fp8, gptq, quantize_checkpoint, with_plain_weights, with_rounded_embedding

import losart
from losart.backends.cpu.backend import CpuBackend
from losart.backends.cpu.convert import narrow, widen
from losart.config.options import generation_config
from losart.config.precision import Precision
from losart.engine.batch import PassKind
from losart.eval.divergence import Follower

pytestmark = pytest.mark.gpu

PROMPT = np.random.default_rng(0).integers(0, 300, 611).tolist()


def hidden_states(model, prompt, block_length):
    """Prefill the prompt's whole blocks; final hidden states of a block after it, as NumPy."""
    transformer = model._engine.runner
    backend, options = transformer.backend, generation_config(model.config, {"block_length": block_length})
    cache = backend.new_cache(16)
    whole = len(prompt) // block_length * block_length
    cache.reserve(whole + block_length)
    for start in range(0, whole, 4 * block_length):
        ids = prompt[start : min(whole, start + 4 * block_length)]
        transformer.forward(block_batch(cache, len(ids), PassKind.PREFILL, ids=ids, options=options))
        cache.advance(len(ids))
    block = np.arange(block_length)
    inputs = {"ids": block + 1, "masked": block, "uniforms": np.zeros(block_length)}
    seen = []

    def propose(hidden, head, batch):
        seen.append(backend.linear(hidden, head))
        return original(hidden, head, batch)

    original, backend.propose = backend.propose, propose
    try:
        transformer.forward(block_batch(cache, block_length, options=options, **inputs))
    finally:
        backend.propose = original
    return seen[0] if isinstance(seen[0], np.ndarray) else matmul_array(backend, seen[0])


SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}


class RoundingBackend(CpuBackend):
    """The CPU backend with what enters a matmul rounded as on the device, queries included."""

    def _rounded(self, x):
        return widen(narrow(np.ascontiguousarray(x), self.precision.activations))

    def linear(self, x, weight, bias=None):
        return super().linear(self._rounded(x), weight, bias)

    prefill_linear = linear

    def split_heads(self, *args):
        q, k, v = super().split_heads(*args)
        return self._rounded(q), k, v


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 2e-2)])
@pytest.mark.parametrize("block_length", [1, 4, 5, 16, 32, 80])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_logits_are_those_of_the_cpu(make_checkpoint, dtype, tolerance, block_length, bias, head_dim):
    # Scores of standard deviation 1: sharper attention makes more of bfloat16's rounding, see below.
    path = make_checkpoint(dtype=dtype, bias=bias, head_dim=head_dim, head_gain=1.0, **SIZES)
    expected = hidden_states(losart.load(path, device="cpu"), PROMPT, block_length)
    found = hidden_states(losart.load(path, device="cuda"), PROMPT, block_length)
    assert relative_error(found, expected) <= tolerance


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("block_length", [4, 32, 80])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_with_rounded_weights_are_those_of_the_cpu(
    make_checkpoint, weights, dtype, block_length, tied
):
    path = make_checkpoint(dtype=dtype, head_gain=1.0, tied=tied, head_dim=64, **SIZES)
    cpu, model = (losart.load(path, device=device, weights=weights) for device in ("cpu", "cuda"))
    expected = hidden_states(with_plain_weights(with_rounded_embedding(cpu)), PROMPT, block_length)
    assert set(model.weights) == {"float8" if weights == "fp8" else weights, "int8"}
    found = hidden_states(model, PROMPT, block_length)
    assert relative_error(found, expected) <= 2e-2


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2), ("float16", 2e-2)])
@pytest.mark.parametrize(("block_length", "head_dim"), [(1, 64), (4, 128), (16, 128), (32, 48), (80, 64)])
def test_logits_with_8_bit_keys_and_values_are_those_of_the_cpu(
    make_checkpoint, kv, dtype, tolerance, block_length, head_dim
):
    """In float32 but for what is rounded the other way, by a whole code."""
    path = make_checkpoint(dtype=dtype, head_dim=head_dim, head_gain=1.0, **SIZES)
    expected, found = (
        hidden_states(losart.load(path, device=device, kv=kv), PROMPT, block_length)
        for device in ("cpu", "cuda")
    )
    assert relative_error(found, expected) <= tolerance


QUANTIZED = {
    "gptq": ({"bits": 4, "group_size": 128}, partial(gptq, bits=4, group=128, version=1, shuffled=False)),
    "gptq, symmetric": (
        {"bits": 4, "group_size": 64, "sym": True},
        partial(gptq, bits=4, group=64, version=1, shuffled=False, symmetric=True),
    ),
    "gptq, shuffled": (
        {"bits": 8, "group_size": 64, "desc_act": True},
        partial(gptq, bits=8, group=64, version=1, shuffled=True),
    ),
    "awq": ({"bits": 4, "group_size": 128}, partial(awq, group=128)),
    "fp8": ({"weight_block_size": [128, 128]}, partial(fp8, block=(128, 128))),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_of_quantized_checkpoints_are_those_of_the_cpu(make_checkpoint, name, dtype):
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    path = make_checkpoint(dtype="float32", head_gain=1.0, head_dim=64, **sizes)
    config, write = QUANTIZED[name]
    quantize_checkpoint(path, {"quant_method": name.split(",")[0]} | config, write)
    expected = hidden_states(with_plain_weights(losart.load(path, "cpu", dtype)), PROMPT, 16)
    model = losart.load(path, "cuda", dtype)
    stays = "shuffled" not in name and (dtype == "float16" or name not in ("gptq", "awq"))
    assert len(model.weights) == 1 + stays
    assert relative_error(hidden_states(model, PROMPT, 16), expected) <= 2e-2


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("merge", [None, "dtype", "codes"])
def test_logits_of_gguf_files_with_adapters_are_those_of_the_cpu(tmp_path, make_checkpoint, kind, merge):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    base = make_checkpoint(family="stable_diffcoder", dtype="float32", head_gain=1.0, head_dim=64, **sizes)
    file = write_gguf(tmp_path / "x.gguf", *parts_of(base, "stable_diffcoder", kind))
    adapter = write_adapter(tmp_path / "adapter", products(base, {"q_proj": 4, "down_proj": 4}, std=0.02))
    more = {} if merge is None else {"adapter": adapter, "merge": merge}
    model = losart.load(file, "cuda", "float16", **more)
    if merge == "codes" and kind == "Q4_1":  # whose zeros are no integers: held in 16 bits, which keeps more
        more["merge"] = "dtype"
    expected = hidden_states(with_plain_weights(losart.load(file, "cpu", "float16", **more)), PROMPT, 16)
    assert relative_error(hidden_states(model, PROMPT, 16), expected) <= 2e-2


@pytest.mark.parametrize(
    ("weights", "kv"), [("int4", "auto"), ("fp8", "auto"), ("auto", "int8"), ("int8", "fp8")]
)
@pytest.mark.parametrize("attention", [{}, {"attention": "losa", "budget": 64}])
def test_sequences_of_quantized_models_share_passes(make_checkpoint, weights, kv, attention):
    """Alone and together, launched one by one and replayed; with `deterministic` bit for bit."""
    path = make_checkpoint(dtype="bfloat16", head_dim=64, **SIZES)
    model = losart.load(path, device="cuda", weights=weights, kv=kv, deterministic=True)
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 16, **attention}
    prompts = [PROMPT[:length] for length in (3, 64, 500, 611)]
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    for _ in range(3):
        assert [one.token_ids for one in model.generate(prompts, **options)] == alone


@pytest.mark.parametrize("block_length", [4, 16])
@pytest.mark.parametrize("head_dim", [48, 128])
def test_sharp_attention_loses_what_the_rounding_loses(make_checkpoint, block_length, head_dim):
    path = make_checkpoint(dtype="bfloat16", head_dim=head_dim, **SIZES)
    model = losart.load(path, device="cpu")
    expected = hidden_states(model, PROMPT, block_length)
    model._engine.runner.backend = RoundingBackend(model.config, Precision.of("bfloat16"))
    rounded = relative_error(hidden_states(model, PROMPT, block_length), expected)
    found = hidden_states(losart.load(path, device="cuda"), PROMPT, block_length)
    assert relative_error(found, expected) <= 1.5 * rounded


@pytest.mark.parametrize(
    "options",
    [
        {"block_length": 1},
        {"block_length": 4, "remasking": "low_confidence_static", "denoising_steps": 2},
        {"block_length": 16, "remasking": "entropy_bounded"},
        {"block_length": 16, "remasking": "sequential"},
        {"block_length": 32, "confidence_threshold": 0.2},
        {"block_length": 80, "confidence_threshold": 0.2},
    ],
)
@pytest.mark.parametrize("length", [3, 64, 611])
def test_greedy_tokens_are_those_of_the_cpu(tiny_checkpoint, options, length):
    prompt = PROMPT[:length]
    cpu, cuda = (losart.load(tiny_checkpoint, device=device) for device in ("cpu", "cuda"))
    options = {"max_new_tokens": 70, "stop_token_ids": [], **options}
    expected = cpu.generate(prompt, **options).token_ids
    for _ in range(2):  # the second replays what the first captured
        found = cuda.generate(prompt, **options)
        assert found.token_ids == expected
    assert found.stats.density == (1.0 if length > 3 or found.stats.commit_passes else None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_length", [1, 4, 16])
@pytest.mark.parametrize(
    "method", [{}, {"attention": "losa"}, {"attention": "losa", "active": 3}, {"attention": "quest"}], ids=str
)
def test_a_commit_that_rides_changes_nothing(tiny_checkpoint, method, block_length, dtype, monkeypatch):
    model = losart.load(tiny_checkpoint, "cuda", dtype)
    options = {
        "max_new_tokens": 50,
        "stop_token_ids": [],
        "block_length": block_length,
        "budget": 64,
        **method,
    }
    found = []
    for rides in ([], [block_length]):
        monkeypatch.setattr(model._engine.runner.backend, "riding_blocks", rides)
        for _ in range(2):  # launched one by one, and replayed
            steps = []
            result = model.generate(PROMPT, observer=steps.append, **options)
            assert result.stats.rides == (
                result.stats.commit_passes if rides and method != {"attention": "quest"} else 0
            )
            kinds = [(step.kind, step.block_start, step.block, step.fixed) for step in steps]
            found.append((kinds, result.token_ids, result.stats.density))
    assert found[0] == found[1] and found[2] == found[3]
    if dtype == "float32":
        assert found[0] == found[2]


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.8}, {}])
def test_samples_are_those_of_the_cpu(tiny_checkpoint, options):
    options = {"temperature": 1.3, "seed": 5, "max_new_tokens": 64, "stop_token_ids": [], **options}
    cpu, cuda = (losart.load(tiny_checkpoint, device=device) for device in ("cpu", "cuda"))
    assert cuda.generate(PROMPT, **options).token_ids == cpu.generate(PROMPT, **options).token_ids


def test_two_generations_on_one_model_do_not_disturb_each_other(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, device="cuda")
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 8}
    expected = [model.generate(prompt, **options).token_ids for prompt in (PROMPT, PROMPT[100:])]
    streams = [model.stream(prompt, **options) for prompt in (PROMPT, PROMPT[100:])]
    results = [None, None]
    while None in results:
        for i, stream in enumerate(streams):
            step = next(stream, None)
            if step is not None and step.result is not None:
                results[i] = step.result.token_ids
    assert results == expected


def test_a_growing_prefix_needs_no_new_capture(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, device="cuda")
    passes = model._engine.runner.backend.runner.passes
    options = {"max_new_tokens": 32, "stop_token_ids": [], "block_length": 8}
    model.generate(PROMPT[:20], **options)
    captured = dict(passes)
    # Passes over a block alone, and with the commit of the block before it.
    found = {(kind, shape.rows) for (*_, (kind, _)), _, buffers in captured for shape in buffers.shapes}
    assert found == {(PassKind.FIRST, 8), (PassKind.FIRST, 16)} and all(captured.values())
    model.generate(PROMPT * 4, **options)
    assert passes == captured


def test_a_long_prompt_goes_in_pieces_and_memory_stays_flat(tiny_checkpoint):
    import cupy

    model = losart.load(tiny_checkpoint, device="cuda")
    backend = model._engine.runner.backend
    cupy.get_default_memory_pool().free_all_blocks()
    backend.prefill_tokens = 512
    pools = (cupy.get_default_memory_pool(), backend.memory.prefill_pool)
    used, taken = {}, {}
    for pieces in (1, 3):
        reports, prompt = [], (PROMPT * 3)[: 512 * pieces]

        def report(*numbers):
            reports.append(numbers)  # noqa: B023
            used[pieces], taken[pieces] = (pool.total_bytes() for pool in pools)  # noqa: B023

        model.generate(prompt, max_new_tokens=4, progress=report)
        assert reports == [(512 * (i + 1), len(prompt)) for i in range(pieces)]
        used[pieces] -= backend.new_cache(16, len(prompt)).bytes_for(len(prompt))
        assert backend.memory.prefill_pool.total_bytes() == 0, "it is given back"
    assert used[3] <= used[1] + (4 << 20)
    assert 0 < taken[3] <= taken[1]


@pytest.mark.parametrize(("prompt", "new_tokens"), [(PROMPT * 4, 4), (PROMPT, 1000)])
def test_a_generation_that_does_not_fit_leaves_the_model_usable(make_checkpoint, prompt, new_tokens):
    import cupy

    # Chunks of the cache that are much larger than all else.
    path = make_checkpoint(num_layers=16, num_heads=8, num_kv_heads=8, head_dim=64)
    model = losart.load(path, device="cuda")
    options = {"stop_token_ids": [], "block_length": 8}
    expected = model.generate(PROMPT, max_new_tokens=16, **options).token_ids
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    room = model._engine.runner.backend.new_cache(16, 1280).bytes_for(1280)
    pool.set_limit(pool.used_bytes() + room)
    try:
        with pytest.raises(losart.OutOfMemoryError, match=r"MiB more are needed .* MiB are free"):
            model.generate(prompt, max_new_tokens=new_tokens, **options)
        assert model.generate(PROMPT, max_new_tokens=16, **options).token_ids == expected
    finally:
        pool.set_limit(0)


def test_memory_that_another_pool_has_cached_is_no_missing_memory(tiny_checkpoint):
    import cupy

    model = losart.load(tiny_checkpoint, device="cuda")
    expected = model.generate(PROMPT[:16], max_new_tokens=4, stop_token_ids=[]).token_ids
    all_there_is, size = [], 1 << 30
    while size >= 1 << 20:
        try:
            all_there_is.append(cupy.empty(size, np.uint8))
        except cupy.cuda.memory.OutOfMemoryError:
            size //= 2
    all_there_is.clear()  # which leaves it with the default pool
    for length in (16, 611):
        tokens = model.generate(PROMPT[:length], max_new_tokens=4, stop_token_ids=[]).token_ids
        assert length == 611 or tokens == expected


HOST_MEMORY_WHILE_LOADING = """
import sys
import threading
import time

import losart

peak, done = 0, threading.Event()


def watch():
    global peak
    while not done.is_set():
        fields = dict(line.split(":") for line in open("/proc/self/status"))
        peak = max(peak, int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0]))
        time.sleep(0.005)


import cupy

cupy.zeros(1).sum().get()
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
before = peak
losart.load(sys.argv[1], device="cuda", dtype=sys.argv[2])
done.set()
print((peak - before) >> 10)
"""


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_loading_takes_little_memory_of_the_host(make_checkpoint, dtype):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 8, "vocab_size": 30_000}
    path = make_checkpoint(dtype="bfloat16", num_heads=16, head_dim=128, **sizes)
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) > 1 << 30
    command = [sys.executable, "-P", "-c", HOST_MEMORY_WHILE_LOADING, str(path), dtype]
    mebibytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert mebibytes < 300


@pytest.mark.parametrize(
    ("name", "value", "prompt"),
    [
        ("layers.0.self_attn.v_proj", np.nan, PROMPT[:3]),
        ("layers.0.self_attn.k_proj", np.nan, PROMPT[:40]),  # a prefix of nothing but NaN keys
        ("layers.0.mlp.down_proj", 1e20, PROMPT[:3]),  # squares overflow in the next norm
    ],
)
def test_what_is_not_finite_is_an_error(make_checkpoint, name, value, prompt):
    path = make_checkpoint(dtype="float32")
    _edit(path, f"model.{name}.weight", slice(None), value)
    with pytest.raises(losart.NumericalError):
        losart.load(path, device="cuda").generate(prompt, max_new_tokens=4)


def test_a_token_without_a_finite_embedding_is_an_error(make_checkpoint):
    path = make_checkpoint(dtype="float32")
    _edit(path, "model.embed_tokens.weight", 7, np.nan)
    with pytest.raises(losart.NumericalError):
        losart.load(path, device="cuda").generate([7], max_new_tokens=4)


def _edit(path, name, rows, value):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors[name][rows] = value
    save_file(tensors, path / "model.safetensors")


def test_memory_that_is_short_once_costs_no_captured_pass_its_place(make_checkpoint, monkeypatch):
    import cupy

    model = losart.load(make_checkpoint(), device="cuda")
    options = {"max_new_tokens": 32, "stop_token_ids": []}
    expected = [model.generate(PROMPT, block_length=length, **options).token_ids for length in (4, 8)]
    plain, refused = cupy.cuda.memory.Memory, []

    def short_once(size):
        if not refused:
            refused.append(size)
            raise cupy.cuda.runtime.CUDARuntimeError(2)  # out of memory
        return plain(size)

    # Larger blocks than any before: their passes want new memory, while those of 4 and 8 are kept.
    monkeypatch.setattr(cupy.cuda.memory, "Memory", short_once)
    model.generate(PROMPT, block_length=64, **options)
    assert refused
    found = [model.generate(PROMPT, block_length=length, **options).token_ids for length in (4, 8)]
    assert found == expected


def test_a_model_goes_on_where_a_thread_of_another_ended(tiny_checkpoint):
    from threading import Thread

    model, found = losart.load(tiny_checkpoint, device="cuda"), []
    options = {"max_new_tokens": 16, "stop_token_ids": []}

    def generate():
        found.append(model.generate(PROMPT, **options).token_ids)

    for _ in range(2):
        thread = Thread(target=generate)
        thread.start()
        thread.join()
    generate()
    threads = [Thread(target=generate) for _ in range(4)]  # at once
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 7 and all(tokens == found[0] for tokens in found)


def test_captured_passes_are_bounded(tiny_checkpoint):
    from losart.backends.cuda.runner import CAPTURED_PASSES

    model = losart.load(tiny_checkpoint, device="cuda")
    for length in range(1, CAPTURED_PASSES // 2 + 4):
        model.generate(PROMPT, block_length=length, max_new_tokens=2 * length, stop_token_ids=[])
    assert len(model._engine.runner.backend.runner.passes) <= CAPTURED_PASSES


@pytest.mark.parametrize("weights", ["auto", "int4"])
@pytest.mark.parametrize("attention", [{}, {"attention": "losa", "budget": 64}])
def test_logits_of_passes_are_those_that_are_proposed_from(make_checkpoint, weights, attention):
    path = make_checkpoint(dtype="bfloat16", head_dim=64, **SIZES)
    model = losart.load(path, device="cuda", weights=weights)
    options = {"max_new_tokens": 24, "block_length": 8, "stop_token_ids": [], **attention}
    expected = list(model.stream(PROMPT, **options))
    runner, config = model._engine.runner, generation_config(model.config, options)
    cache = runner.new_cache(config, len(PROMPT) + 24)
    follower, steps = Follower(runner, PROMPT, config, runner.prefill_tokens, cache), iter(expected)
    while not follower.sequence.finished:
        after = follower.run()
        if after is not None:
            fixed = next(steps).fixed
            masked = follower.sequence._masked
            best = follower.logits.argmax(axis=1)
            assert len(best) == len(masked)
            assert [after[0][row] for row in fixed] == [best[masked.index(row)] for row in fixed]
        follower.sequence.apply(*after or ())
    assert next(steps, None) is None
