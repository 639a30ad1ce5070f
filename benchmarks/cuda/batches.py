"""Many sequences at once: blocks decoded together, from caches that hold noise in place of a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from benchmarks.cuda.experts import SIZES, active_parameters, config_of
from benchmarks.cuda.model import NoiseModel, TimedTransformer
from benchmarks.cuda.noise import kv_bytes, weight_bytes, written_cache
from benchmarks.cuda.timing import queued_microseconds
from benchmarks.cuda.torch_attention import run_microseconds
from benchmarks.support.attempts import attempt, free_memory, ratio
from benchmarks.support.transformers_pass import TransformersPass
from losart.backends.cuda.matmul import blas_matmul
from losart.config.options import generation_config
from losart.config.precision import BFLOAT16
from losart.engine.batch import PassKind
from losart.engine.engine import Engine
from losart.engine.run import Run

NEW_TOKENS = 256
LONG_PROMPT = 32768
MANY = 16  # sequences; only of more is transformers' pass measured, and prefill beside them
DENSE: dict[str, Any] = {}
LOSA = {"attention": "losa", "budget": 128}
OUT_OF_STEP = "losa, out of step"  # each block in up to three passes less, so that kinds of passes mix
METHODS = {
    "dense": DENSE,
    "losa": LOSA,
    "losa 5": LOSA | {"active": 5},
    OUT_OF_STEP: LOSA,
    "losa, first pass and commit sparse": LOSA | {"first_pass": "sparse", "commit": "sparse"},
}


class Batch(NamedTuple):
    """What is decoded together: prompts of so many tokens, in so many passes per block.

    `size` is SDAR's, or a mixture of experts. Where weights are fp8, activations of many tokens are, too.
    """

    size: str
    sequences: int
    prompt: int
    block: int
    passes: int
    methods: tuple[str, ...] = ("dense",)
    deterministic: bool = False
    weights: str = "bfloat16"


BATCHES = (
    Batch("4B", 128, 512, 4, 4),
    Batch("4B", 128, 512, 4, 2),
    Batch("4B", 128, 512, 4, 4, deterministic=True),
    Batch("8B", 128, 512, 4, 4),
    Batch("8B", 128, 512, 4, 2),
    Batch("8B", 128, 512, 4, 4, weights="fp8"),
    Batch("8B", 128, 512, 4, 2, weights="fp8"),
    Batch("LLaDA2.0-mini", 128, 512, 32, 16),
    Batch("8B", 8, 65536, 16, 16, tuple(METHODS)),
    Batch("8B", 4, 131072, 16, 16, tuple(METHODS)),
)
QUICK = (Batch("1.7B", 32, 512, 4, 4), Batch("1.7B", 8, 16384, 16, 16, tuple(METHODS)))


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per size, number of sequences and method."""
    rate = attempt(matmul_rate)
    model: Any = None
    loaded = None
    for batch in QUICK if quick else BATCHES:
        size, sequences, prompt, block, passes, methods, deterministic, weights = batch
        if (size, deterministic, weights) != loaded:
            del model
            free_memory()
            sizes = config_of(size) if size in SIZES else size
            activations = "fp8" if weights == "fp8" else "auto"
            options = {"deterministic": deterministic, "weights": weights, "activations": activations}
            model = attempt(NoiseModel, sizes, TimedTransformer, **options)
            loaded = size, deterministic, weights
        row = {"size": size, "sequences": sequences, "prompt": prompt, "block": block, "passes": passes}
        row |= {"weights": weights, "deterministic": "yes" if deterministic else ""}
        caches = model if isinstance(model, str) else attempt(noise_caches, model, sequences, prompt, block)
        if isinstance(caches, str):
            yield row | {"method": caches}
            continue
        dense = None
        theirs = (
            attempt(their_milliseconds, size, sequences, prompt, block)
            if sequences > MANY and passes == block and not deterministic and weights == "bfloat16"
            else None
        )
        for name in methods:
            decoding = METHODS[name] | {"block_length": block, "denoising_steps": passes}
            paces = 4 if name == OUT_OF_STEP else 1
            measured = attempt(decode, model, caches, prompt, decoding, paces)
            if isinstance(measured, str):
                yield row | {"method": name, "tokens a second": measured}
                continue
            dense = measured["tokens a second"] if name == "dense" else dense
            caches_read = measured.pop("caches")
            floor = None
            if weights == "bfloat16":
                floor = pass_floor(model, caches_read, prompt, measured, bandwidth, rate)
            more = {
                "floor ms": floor,
                "pass/floor": ratio(measured["pass ms"], floor),
                "method/dense": ratio(measured["tokens a second"], dense),
                "transformers ms": theirs,
            }
            yield row | {"method": name} | measured | more
        if sequences > MANY and passes == block and not deterministic:
            beside = attempt(prefill_beside, model, caches, prompt, block)
            failed = {"tokens a second": beside} if isinstance(beside, str) else beside
            yield row | {"method": f"{LONG_PROMPT} tokens prefilled beside"} | failed
        del caches
        free_memory()


def noise_caches(model: NoiseModel, sequences: int, prompt: int, block: int) -> list[Any]:
    """Caches that hold a prompt each."""
    c, random = model.config, cupy.random.RandomState(0)

    def draw(_layer: int, _start: int, count: int) -> tuple[Any, Any]:
        shape = (count, c.num_kv_heads, c.head_dim)
        return random.standard_normal(shape, np.float32), random.standard_normal(shape, np.float32)

    with model.backend.memory.stream:
        return [written_cache(model.backend, prompt, NEW_TOKENS + block, draw) for _ in range(sequences)]


def decode(
    model: NoiseModel, caches: list[Any], prompt: int, options: dict[str, Any], paces: int
) -> dict[str, Any]:
    """New tokens of all sequences over the time that they take, after a round that captures.

    Sequences differ in their steps per block, of which there are as many numbers as `paces`.
    """
    fixed = {"remasking": "low_confidence_static", "stop_token_ids": [], "max_new_tokens": NEW_TOKENS}
    steps = [options["denoising_steps"] - index % paces for index in range(len(caches))]
    configs = [
        generation_config(model.config, fixed | options | {"denoising_steps": count}) for count in steps
    ]
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(len(caches), prompt)).tolist()
    engine = Engine(model.transformer, len(caches), prefill_first=True)

    def generate(held: int) -> tuple[float, list[Run]]:
        """Seconds of all sequences, of whose prompts so much is in the caches, and the sequences."""
        for cache in caches:
            cache.length = held
        sequences = list(map(engine.sequence, prompts, configs, caches))
        runs = [Run(sequence, each_step=False) for sequence in sequences]
        model.transformer.passes.clear()
        began = time.perf_counter()
        for run in runs:
            engine._join(run)
        for run in runs:
            while engine._advance(run):
                run.steps.clear()
        return time.perf_counter() - began, runs

    more = {}
    if len(caches) > MANY:
        more["with prefill"] = len(caches) * NEW_TOKENS / min(generate(0)[0] for _ in range(2))
    for _ in range(2):
        seconds, runs = generate(prompt)
    passes = model.transformer.passes
    count = len(passes)
    rows, read, times = (sum(getattr(one, of) for one in passes) for of in ("rows", "caches", "seconds"))
    stats = [run.sequence.result().stats for run in runs]
    return {
        "tokens a second": len(caches) * NEW_TOKENS / seconds,
        **more,
        "pass ms": 1e3 * times / count,
        "between passes ms": 1e3 * (seconds - times) / count,
        "rows": rows / count,
        "caches": read / count,
        "density": float(np.mean([one.density for one in stats])),
    }


def prefill_beside(model: NoiseModel, caches: list[Any], prompt: int, block: int) -> dict[str, Any]:
    """How long sequences wait for a pass while a long prompt is prefilled, in milliseconds."""
    fixed = {"remasking": "low_confidence_static", "stop_token_ids": [], "max_new_tokens": NEW_TOKENS}
    config = generation_config(model.config, fixed | {"block_length": block, "denoising_steps": block})
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=LONG_PROMPT).tolist()
    engine = Engine(model.transformer, len(caches) + 1)
    for cache in caches:
        cache.length = prompt
    runs = [Run(engine.sequence(ids[:prompt], config, cache)) for cache in caches]
    long = Run(engine.sequence(ids, config, engine.new_cache(ids, config)))
    for run in (*runs, long):
        engine._join(run)
    model.transformer.passes.clear()
    while long.prefills:
        engine._advance(runs[0])
        for run in runs:
            run.steps.clear()
    over_blocks = [one for one in model.transformer.passes if one.kind is not PassKind.PREFILL]
    waits = np.diff([one.ended for one in over_blocks])
    return {
        "pass ms": 1e3 * float(np.median([one.seconds for one in over_blocks])),
        "median wait ms": 1e3 * float(np.median(waits)),
        "p99 wait ms": 1e3 * float(np.percentile(waits, 99)),
    }


def their_milliseconds(size: str, sequences: int, prompt: int, block: int) -> float:
    """Of a forward by transformers over a block of each sequence, without sampling."""
    return run_microseconds(TransformersPass(size).after(prompt, block, sequences)) / 1e3


def pass_floor(
    model: NoiseModel, caches: float, prompt: int, measured: dict[str, Any], bandwidth: float, rate: Any
) -> float | None:
    """Milliseconds of a mean pass: bytes over the copy bandwidth, and operations over the rate of matmuls.

    With experts, of which all are used; `caches`: those of a mean pass.
    """
    if isinstance(rate, str):
        return None
    config = model.config
    kv = caches * config.num_layers * kv_bytes(config, prompt) * measured["density"]
    operations = 2 * measured["rows"] * (active_parameters(config) + config.vocab_size * config.hidden_size)
    return 1e3 * ((weight_bytes(config) + kv) / bandwidth + operations / rate)


def matmul_rate() -> float:
    """Operations per second of a large product by cuBLAS."""

    size = 8192
    x, y = (cupy.zeros((size, size), np.uint16) for _ in range(2))
    stream = cupy.cuda.get_current_stream()
    return 2e6 * size**3 / queued_microseconds(stream, lambda: blas_matmul(x, y, BFLOAT16), 5)
