"""Token for token, greedy generation is what transformers' Qwen3 gives without a cache.

Random checkpoints of few layers; float32 on both sides.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import losart

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", reason="the oracle needs transformers")

import oracle
import torch

from losart.measure.random_checkpoint import write_checkpoint

pytestmark = pytest.mark.parity

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 3,
    "head_dim": 16,
    "tokenizer": False,
    "seed": 1,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "bias": {"bias": True},
    "tied bias": {"tied": True, "bias": True},
    "sharded": {"shards": 3},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 tied sharded": {"dtype": "bfloat16", "tied": True, "shards": 2},
    "float16": {"dtype": "float16"},
    "a kv head per head": {"num_kv_heads": 4},
    "one kv head": {"num_heads": 6, "num_kv_heads": 1},
    "wide heads": {"head_dim": 32, "num_heads": 8},
    "short rope": {"rope_theta": 100.0},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear by its old key": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {
        "rope_theta": 1e4,
        "max_positions": 128,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "yarn with options": {
        "rope_theta": 1e4,
        "max_positions": 512,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    },
    "llama3": {"rope_theta": 1e4, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
}
SEQUENTIAL, STATIC = "sequential", "low_confidence_static"
DYNAMIC, ENTROPY = "low_confidence_dynamic", "entropy_bounded"


@dataclass(frozen=True)
class Case:
    checkpoint: str
    block_length: int
    denoising_steps: int
    remasking: str
    prompt: int
    new: int
    confidence_threshold: float = 0.4
    eb_threshold: float = 5.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = "".join(f"-{name}={value}" for name, value in self.extra.items())
        thresholds = f"{self.confidence_threshold}-{self.eb_threshold}"
        return (
            f"{self.checkpoint}-{self.remasking}-block{self.block_length}-steps{self.denoising_steps}"
            f"-{self.prompt}+{self.new}-{thresholds}{extra}"
        ).replace(" ", "_")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.new,
            "block_length": self.block_length,
            "denoising_steps": self.denoising_steps,
            "remasking": self.remasking,
            "confidence_threshold": self.confidence_threshold,
            "eb_threshold": self.eb_threshold,
            "stop_token_ids": [],
        }


CASES = [
    # Strategies, block lengths, steps; prompts of less than a block, whole blocks and a remainder.
    Case("untied", 4, 4, SEQUENTIAL, 11, 17),
    Case("untied", 4, 4, STATIC, 8, 16),
    Case("untied", 4, 2, STATIC, 3, 18),
    Case("untied", 4, 3, STATIC, 6, 15),
    Case("untied", 4, 4, DYNAMIC, 11, 24),
    Case("untied", 4, 3, DYNAMIC, 4, 13),
    Case("untied", 4, 4, ENTROPY, 4, 20),
    Case("untied", 4, 1, STATIC, 6, 12),
    Case("untied", 4, 9, STATIC, 5, 12),
    Case("untied", 5, 5, STATIC, 12, 18),
    Case("untied", 5, 3, SEQUENTIAL, 5, 16),
    Case("untied", 5, 2, DYNAMIC, 3, 16),
    Case("untied", 5, 5, ENTROPY, 7, 19),
    Case("tied", 16, 16, STATIC, 21, 27),
    Case("tied", 16, 5, SEQUENTIAL, 16, 32),
    Case("tied", 16, 6, DYNAMIC, 7, 40),
    Case("tied", 16, 4, ENTROPY, 40, 24),
    Case("untied", 1, 1, STATIC, 1, 12),
    Case("untied", 1, 1, DYNAMIC, 6, 12),
    Case("tied", 1, 1, ENTROPY, 3, 12),
    # Thresholds at their ends.
    Case("untied", 4, 4, DYNAMIC, 7, 12, confidence_threshold=0.0),
    Case("untied", 4, 4, DYNAMIC, 7, 12, confidence_threshold=1.0),
    Case("untied", 4, 4, ENTROPY, 7, 12, eb_threshold=0.0),
    Case("untied", 4, 3, ENTROPY, 7, 12, eb_threshold=0.0),
    # Checkpoints.
    Case("bias", 4, 4, DYNAMIC, 10, 16),
    Case("tied bias", 5, 4, STATIC, 11, 16),
    Case("sharded", 4, 4, DYNAMIC, 10, 16),
    Case("bfloat16", 4, 4, STATIC, 9, 16),
    Case("bfloat16 tied sharded", 16, 8, DYNAMIC, 20, 28),
    Case("float16", 4, 4, ENTROPY, 9, 16),
    Case("a kv head per head", 4, 4, DYNAMIC, 13, 16),
    Case("one kv head", 4, 4, DYNAMIC, 13, 16),
    Case("wide heads", 4, 4, STATIC, 13, 16),
    Case("short rope", 4, 4, DYNAMIC, 130, 16),
    Case("linear", 4, 4, DYNAMIC, 50, 16),
    Case("linear by its old key", 4, 4, STATIC, 23, 16),
    Case("yarn", 4, 4, DYNAMIC, 101, 16),
    Case("yarn with options", 16, 5, DYNAMIC, 70, 32),
    Case("llama3", 4, 4, STATIC, 90, 16),
    # A mask token of the caller's choice.
    Case("tied", 4, 4, STATIC, 6, 12, extra={"mask_token_id": 17}),
    # Everything active and read: the policies are dense attention.
    Case("untied", 16, 6, DYNAMIC, 75, 32, extra={"attention": "losa", "active": 1.0, "budget": 4096}),
    Case("untied", 4, 4, STATIC, 75, 16, extra={"attention": "losa", "active": 4, "budget": 96}),
    Case("untied", 16, 6, DYNAMIC, 75, 32, extra={"attention": "quest", "budget": 4096}),
    Case(
        "untied", 16, 6, DYNAMIC, 75, 32, extra={"attention": "sparsed", "budget": 4096, "commit": "sparse"}
    ),
]


@dataclass(frozen=True)
class Pair:
    """A checkpoint and the runtime's model of it."""

    path: Path
    model: Any
    mask_token_id: int

    def expected(self, prompt: list[int], options: dict[str, Any]) -> list[int]:
        return oracle.generate(self.path, prompt, **{"mask_token_id": self.mask_token_id, **options})

    def actual(self, prompt: list[int], options: dict[str, Any]) -> list[int]:
        return list(self.model.generate(prompt, **options).token_ids)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    @functools.cache
    def make(name: str) -> Pair:
        path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **{**SMALL, **CHECKPOINTS[name]})
        mask_token_id = json.loads((path / "config.json").read_text())["mask_token_id"]
        return Pair(path, losart.load(path, device="cpu", dtype="float32"), mask_token_id)

    yield make
    torch.set_num_threads(threads)


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 256, length).tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tokens_are_the_oracles(pair: Callable[[str], Pair], case: Case) -> None:
    both = pair(case.checkpoint)
    prompt = prompt_of(case.prompt)
    mask = {name: case.extra[name] for name in case.extra if name == "mask_token_id"}
    expected = both.expected(prompt, {**case.options, **mask})
    assert both.actual(prompt, {**case.options, **case.extra}) == expected
    assert len(expected) == case.new


@pytest.mark.parametrize("position", [0, 5, 14])
def test_generation_ends_at_a_stop_token(pair: Callable[[str], Pair], position: int) -> None:
    both = pair("untied")
    prompt = prompt_of(6)
    options = Case("untied", 4, 4, STATIC, 6, 18).options
    stop = both.expected(prompt, options)[position]
    expected = both.expected(prompt, {**options, "stop_token_ids": [stop]})
    assert expected[-1] == stop and len(expected) < 18
    assert both.actual(prompt, {**options, "stop_token_ids": [stop]}) == expected


def test_one_generation_leaves_nothing_for_the_next(pair: Callable[[str], Pair]) -> None:
    both = pair("tied")
    long, short = Case("tied", 16, 6, DYNAMIC, 40, 32), Case("tied", 4, 4, STATIC, 5, 12)
    for case in (long, short, long):
        prompt = prompt_of(case.prompt)
        assert both.actual(prompt, case.options) == both.expected(prompt, case.options)
