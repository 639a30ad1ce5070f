"""Mixtures of experts: passes over blocks and prefill, with noise for weights, against the memory's floor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np

from benchmarks.cuda.model import NoiseModel
from benchmarks.cuda.noise import (
    BFLOAT16,
    NoiseBackend,
    filled_cache,
    held_bytes,
    kv_bytes,
    model_config,
    noise,
    weight_bytes,
)
from benchmarks.cuda.timing import graph_microseconds, run_microseconds
from benchmarks.cuda.torch_attention import run_microseconds as torch_microseconds
from benchmarks.support.attempts import attempt, free_memory, ratio
from benchmarks.support.transformers_pass import TransformersPass
from losart.backends.base import ExpertWeights
from losart.backends.cuda.experts import experts
from losart.backends.cuda.results import Matmul
from losart.config.model import ExpertsConfig, ModelConfig
from losart.config.options import generation_config
from losart.engine.batch import PassBatch, PassKind, PassResult, SequencePass

SDAR_EXPERTS = ExpertsConfig(128, per_token=8, intermediate_size=768)
LLADA_EXPERTS = ExpertsConfig(
    256,
    per_token=8,
    intermediate_size=512,
    scores="sigmoid",
    bias=True,
    groups=8,
    kept_groups=4,
    scaling=2.5,
    shared=1,
    dense_layers=frozenset([0]),
)
SIZES: dict[str, dict[str, Any]] = {
    "SDAR-30B-A3B": {"intermediate_size": 6144, "num_layers": 48, "num_heads": 32, "experts": SDAR_EXPERTS},
    "LLaDA2.0-mini": {
        "intermediate_size": 5120,
        "num_layers": 20,
        "num_heads": 16,
        "vocab_size": 157184,
        "experts": LLADA_EXPERTS,
    },
}
BLOCKS = {"SDAR-30B-A3B": (4, 16), "LLaDA2.0-mini": (32,)}
BATCHES = ((1, 8192), (1, 65536), (32, 8192))  # sequences, and the prefix of each
WEIGHTS = ("bfloat16", "int8", "int4")
TOKENS = (4, 16, 32, 512, 4096)
LAYERS = 4
PROMPT = 8192
SHORT = 256  # prefix


def config_of(name: str, **changes: Any) -> ModelConfig:
    """A model's sizes."""
    return model_config("1.7B", **({"num_kv_heads": 4, "tie_embeddings": False} | SIZES[name] | changes))


class Blocks:
    """Passes over a block of each of some sequences after prefixes of noise.

    Attributes
    ----------
    used : float
        Experts that a layer used in the last pass.
    """

    def __init__(self, model: NoiseModel, sequences: int, prefix: int, block: int) -> None:
        self._model = model
        self._options = generation_config(model.config, {"block_length": block})
        self._caches = [filled_cache(model.backend, prefix, block) for _ in range(sequences)]
        self._ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(sequences, block))
        self.used = 0.0

    def run(self) -> None:
        """Run a pass."""
        masked = np.arange(self._options.block_length, dtype=np.int32)
        passes = (
            SequencePass(PassKind.LATER, ids, cache.length, self._options, cache, None, masked)
            for ids, cache in zip(self._ids, self._caches, strict=True)
        )
        result: PassResult = self._model.transformer.forward(PassBatch(tuple(passes)))
        self.used = result.experts_used or 0.0

    def milliseconds(self) -> float:
        """Median of a pass, after those that compile and capture it."""
        return run_microseconds(self._model.backend.memory.stream, self.run) / 1e3


def pass_rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per model, format, block, sequences and prefix; transformers: SDAR-MoE's sizes, bfloat16."""
    batches = BATCHES[:1] if quick else BATCHES
    theirs = transformers_milliseconds("SDAR-30B-A3B", "30B-A3B", batches)
    for name, weights in itertools.product(SIZES, WEIGHTS):
        model = attempt(NoiseModel, config_of(name), weights=weights)
        for block in BLOCKS[name]:
            for sequences, prefix in batches:
                sizes = sequences, prefix, block
                row = {"model": name, "weights": weights, "block": block}
                row |= {"sequences": sequences, "prefix": prefix}
                row |= {"losart": model} if isinstance(model, str) else measured(model, bandwidth, *sizes)
                row["transformers"] = theirs.get((name, *sizes)) if weights == "bfloat16" else None
                yield row | {"transformers/losart": ratio(row["transformers"], row["losart"])}
                free_memory()
        del model
        free_memory()


def transformers_milliseconds(
    name: str, size: str, batches: tuple[tuple[int, int], ...]
) -> dict[tuple[str, int, int, int], Any]:
    """Median of a pass by name, sequences, prefix and block, its default way through the experts."""
    model = attempt(TransformersPass, size)
    times: dict[tuple[str, int, int, int], Any] = {}
    for block in BLOCKS[name]:
        for sequences, prefix in batches:
            time = model
            if not isinstance(model, str):
                time = attempt(transformers_pass_milliseconds, model, sequences, prefix, block)
            times[name, sequences, prefix, block] = time
    del model, time
    free_memory()
    return times


def transformers_pass_milliseconds(model: TransformersPass, sequences: int, prefix: int, block: int) -> float:
    """Median of one of transformers' passes."""
    return torch_microseconds(model.after(prefix, block, sequences)) / 1e3


def milliseconds(model: NoiseModel, sequences: int, prefix: int, block: int) -> float:
    """Of a pass over a block of each sequence."""
    return Blocks(model, sequences, prefix, block).milliseconds()


def measured(model: NoiseModel, bandwidth: float, sequences: int, prefix: int, block: int) -> dict[str, Any]:
    """A pass's time and its floor, in milliseconds, or why it failed."""
    blocks: Any = attempt(Blocks, model, sequences, prefix, block)
    time = blocks if isinstance(blocks, str) else attempt(blocks.milliseconds)
    if isinstance(time, str):
        return {"losart": time}
    config, experts = model.config, model.config.experts
    assert experts is not None
    floor = (pass_bytes(model, blocks.used) + sequences * kv_of(config, prefix)) / bandwidth * 1e3
    figures = {"floor": floor, "losart": time, "losart/floor": ratio(time, floor)}
    return {"used": blocks.used, "of": experts.count} | figures


def pass_bytes(model: NoiseModel, used: float) -> float:
    """Of the weights that a pass must read when its layers use so many experts."""
    layers = (layer.feed_forward for layer in model.transformer.layers)
    return model.read_bytes - sum(
        stack_bytes(layer) - used_bytes(layer, used) for layer in layers if isinstance(layer, ExpertWeights)
    )


def stack_bytes(layer: ExpertWeights) -> int:
    """Of the weights of all experts."""
    return held_bytes(layer.gate_up) + held_bytes(layer.down)


def used_bytes(layer: ExpertWeights, used: float) -> float:
    """Of those of so many, and of shared ones."""
    config = layer.config
    return stack_bytes(layer) * (used + config.shared) / (config.count + config.shared)


def layer_rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per model, format of weights and number of tokens: a layer's experts, in microseconds."""
    for name, weights in itertools.product(SIZES, WEIGHTS):
        layers = attempt(noise_layers, name, weights)
        for tokens in TOKENS[:1] if quick else TOKENS:
            row = {"model": name, "weights": weights, "tokens": tokens}
            yield row | (
                {"losart": layers} if isinstance(layers, str) else timed_layer(layers, tokens, bandwidth)
            )
        del layers
        free_memory()


def noise_layers(name: str, weights: str) -> tuple[NoiseBackend, list[ExpertWeights]]:
    """A backend, and experts of some layers: too many for the device's cache, however few are used."""
    config: ExpertsConfig = SIZES[name]["experts"]
    model = config_of(name, num_layers=1)
    backend, every = NoiseBackend(model, BFLOAT16), config.count + config.shared
    with backend.memory.stream:
        bias = cupy.zeros(config.count, np.float32) if config.bias else None
    shapes = (
        (every, 2 * config.intermediate_size, model.hidden_size),
        (every, model.hidden_size, config.intermediate_size),
    )
    stacks = ((backend.stack(*shape, weights) for shape in shapes) for _ in range(LAYERS))
    return backend, [ExpertWeights(config, None, bias, *pair) for pair in stacks]


def timed_layer(
    made: tuple[NoiseBackend, list[ExpertWeights]], tokens: int, bandwidth: float
) -> dict[str, Any]:
    """The experts that random logits use, and the time from there to the sums of all tokens."""
    backend, layers = made
    config, turn, stream = layers[0].config, itertools.cycle(layers), backend.memory.stream
    logits = np.random.default_rng(tokens).standard_normal((1, tokens, config.count), np.float32)
    with stream:
        x = cupy.empty((tokens, backend.config.hidden_size), np.uint16)
        noise(np.float32(1.7), x)
        matmul, used = Matmul(cupy.asarray(logits), None), cupy.zeros(1, np.int32)

    def run() -> Matmul:
        return experts(backend.kernels, x, matmul, next(turn), False, used)

    with stream:
        run()
        count = int(used.get(stream)[0])
    floor = used_bytes(layers[0], count) / bandwidth * 1e6
    microseconds = graph_microseconds(stream, run, 2 * LAYERS)
    figures = {"used": count, "floor": floor, "losart": microseconds}
    return figures | {"losart/floor": ratio(microseconds, floor)}


def kv_of(config: ModelConfig, prefix: int) -> int:
    """Bytes of a prefix's keys and values."""
    return config.num_layers * kv_bytes(config, prefix)


def prefill_rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per model and format of weights; a dense one comes first."""
    dense = None
    for name, weights in (("8B", "bfloat16"), *itertools.product(SIZES, WEIGHTS)):
        config = model_config(name) if name == "8B" else config_of(name)
        model = attempt(NoiseModel, config, weights=weights)
        seconds = model if isinstance(model, str) else attempt(prefill_seconds, model)
        if isinstance(seconds, str):
            yield {"model": name, "weights": weights, "tokens a second": seconds}
        else:
            active, speed = active_parameters(config), PROMPT / seconds
            rate = 2e-12 * active * speed
            dense = rate if name == "8B" else dense
            yield {
                "model": name,
                "weights": weights,
                "active": f"{active / 1e9:.2f}B",
                "tokens a second": speed,
                "rate": rate,
                "rate/8B's": ratio(rate, dense),
            }
        del model
        free_memory()


def prefill_seconds(model: NoiseModel) -> float:
    """Of a prompt."""
    options = generation_config(model.config, {"block_length": 16})
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=PROMPT)
    cache = filled_cache(model.backend, 0, PROMPT)
    piece = model.transformer.prefill_tokens

    def run() -> None:
        cache.length = 0
        for start in range(0, PROMPT, piece):
            some = ids[start : start + piece]
            one = SequencePass(PassKind.PREFILL, some, start, options, cache, None)
            model.transformer.forward(PassBatch((one,)))
            cache.advance(len(some))

    return run_microseconds(model.backend.memory.stream, run, 2, 5) / 1e6


def active_parameters(config: ModelConfig) -> int:
    """That each token is multiplied by, but for head and embedding."""
    every, experts = weight_bytes(config) // 2 - config.vocab_size * config.hidden_size, config.experts
    if experts is None:
        return every
    unused = config.expert_layers * (experts.count - experts.per_token)
    return every - unused * 3 * experts.intermediate_size * config.hidden_size


def used_rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per model and block length: experts by the number of sequences."""
    counts = (1, 4) if quick else (1, 4, 16, 32)
    for name, size in SIZES.items():
        experts: ExpertsConfig = size["experts"]
        model = attempt(NoiseModel, config_of(name, num_layers=4))
        for block in (4, 8, 16, 32):
            row: dict[str, Any] = {"model": name, "block": block}
            for sequences in counts:
                row[f"{sequences}"] = (
                    model if isinstance(model, str) else attempt(used, model, sequences, block)
                )
                tokens = sequences * block
                missed = (1 - experts.per_token / experts.count) ** tokens
                row[f"{sequences}, random"] = experts.count * (1 - missed)
            yield row
        del model
        free_memory()


def used(model: NoiseModel, sequences: int, block: int) -> float:
    """Experts that a layer uses."""
    blocks = Blocks(model, sequences, SHORT, block)
    blocks.run()
    return blocks.used
