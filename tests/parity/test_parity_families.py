"""Logits and greedy generations of every family are those of transformers' classes, token for token.

Random checkpoints of few layers; float32 on both sides. The decoding of each family is written anew in
`tests/support/family_oracles.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import losart

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", reason="the oracle needs transformers")

import family_oracles
import oracle

from losart.measure.random_checkpoint import write_checkpoint

pytestmark = pytest.mark.parity

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "head_dim": 16, "tokenizer": False}
Case = tuple[str, dict[str, Any], dict[str, Any], Callable[..., list[int]]]


def dynamic(block: int, steps: int, threshold: float) -> tuple[dict[str, Any], Callable[..., list[int]]]:
    """SDAR's and LLaDA2.0's decoding."""
    options = {"block_length": block, "denoising_steps": steps, "remasking": "low_confidence_dynamic"}
    options |= {"confidence_threshold": threshold}

    def expected(model: Any, prompt: list[int], new: int, mask_id: int, stops: list[int]) -> list[int]:
        more = {"eb_threshold": 0.0, "mask_token_id": mask_id, "stop_token_ids": stops}
        return oracle.generate_with(model, prompt, max_new_tokens=new, **options, **more)

    return options, expected


def of_family(
    name: str, options: dict[str, Any], **given: Any
) -> tuple[dict[str, Any], Callable[..., list[int]]]:
    """A family's own decoding: losart's options, and its procedure with the same."""

    def expected(model: Any, prompt: list[int], new: int, mask_id: int, stops: list[int]) -> list[int]:
        procedure = getattr(family_oracles, name)
        forward = family_oracles.forward_of(model)
        return procedure(forward, prompt, new, mask_id=mask_id, stops=stops, **given)

    return options, expected


def fast_dllm(block: int, sub_block: int, threshold: float) -> Any:
    options = {"block_size": block, "small_block_size": sub_block, "threshold": threshold}
    return of_family("fast_dllm", options, block=block, sub_block=sub_block, threshold=threshold)


def diffcoder(block: int, steps: int, threshold: float | None) -> Any:
    options: dict[str, Any] = {"block_length": block, "denoising_steps": steps}
    if threshold is not None:
        options |= {"remasking": "low_confidence_dynamic", "threshold": threshold}
    return of_family("stable_diffcoder", options, block=block, steps=steps, threshold=threshold)


def llada2_1(block: int, threshold: float, editing: float, post: int = 16) -> Any:
    same = {"threshold": threshold, "editing_threshold": editing, "max_post_steps": post}
    return of_family("llada2_1", {"block_length": block} | same, block=block, **same)


def nemotron(block: int, threshold: float | None, steps: int = 1) -> Any:
    options: dict[str, Any] = {"block_length": block, "threshold": threshold}
    if threshold is None:
        options = {"block_length": block, "steps": steps, "remasking": "low_confidence_static"}
    return of_family("nemotron", options, block=block, threshold=threshold, steps=steps)


EXPERTS = [
    {},
    {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 48},
    {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 32},
    {"num_experts": 6, "num_experts_per_tok": 6, "norm_topk_prob": False},
    {"mlp_only_layers": [1], "num_experts_per_tok": 3},
    {"decoder_sparse_step": 2},
]
GROUPS = [
    {},
    {"num_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    {"num_experts": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8},
    {"first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    {"partial_rotary_factor": 0.25, "rope_theta": 1e4},
]
CASES: dict[str, Case] = {}
for i, extra in enumerate(EXPERTS):
    CASES[f"sdar_moe-{i}"] = ("sdar_moe", {"extra_config": extra}, *dynamic(4, 4, 0.4))
for i, extra in enumerate(GROUPS):
    CASES[f"llada2.0-{i}"] = ("llada2_moe", {"extra_config": extra}, *dynamic(8, 4 + 2 * (i % 3), 0.4))
    CASES[f"llada2.1-{i}"] = ("llada2_moe", {"extra_config": extra}, *llada2_1(8, 0.4, 0.33 - 0.11 * (i % 3)))
CASES |= {
    "llada2.1 few posts": ("llada2_moe", {}, *llada2_1(4, 0.3, 0.0, 1)),
    "llada2.1 no posts": ("llada2_moe", {}, *llada2_1(4, 0.3, 0.0, 0)),
    "fast 8/4": ("Fast_dLLM_Qwen", {}, *fast_dllm(8, 4, 0.3)),
    "fast 8/8": ("Fast_dLLM_Qwen", {"seed": 3}, *fast_dllm(8, 8, 0.5)),
    "fast 16/4 tied": ("Fast_dLLM_Qwen", {"tied": True}, *fast_dllm(16, 4, 0.9)),
    "fast 6/4": ("Fast_dLLM_Qwen", {"num_heads": 7, "num_kv_heads": 1}, *fast_dllm(6, 4, 0.2)),
    "fast one by one": ("Fast_dLLM_Qwen", {"seed": 5}, *fast_dllm(4, 2, 1.0)),
    "diffcoder": ("stable_diffcoder", {}, *diffcoder(4, 4, None)),
    "diffcoder few steps": ("stable_diffcoder", {"seed": 2}, *diffcoder(8, 3, None)),
    "diffcoder threshold": ("stable_diffcoder", {}, *diffcoder(4, 4, 0.3)),
    "diffcoder odd": ("stable_diffcoder", {"num_heads": 8, "num_kv_heads": 4}, *diffcoder(5, 4, None)),
    "diffcoder bias": ("stable_diffcoder", {"bias": True}, *diffcoder(4, 2, None)),
    "nemotron": ("nemotron_labs_diffusion", {}, *nemotron(8, 0.3)),
    "nemotron 4": ("nemotron_labs_diffusion", {"seed": 2}, *nemotron(4, 0.5)),
    "nemotron 32": ("nemotron_labs_diffusion", {"num_heads": 6, "num_kv_heads": 2}, *nemotron(32, 0.2)),
    "nemotron all": ("nemotron_labs_diffusion", {"seed": 4}, *nemotron(7, 0.0)),
    "nemotron even": ("nemotron_labs_diffusion", {"seed": 3}, *nemotron(8, None, 3)),
}
PROMPTS = [(1, 9), (3, 24), (4, 8), (8, 16), (16, 17), (17, 31), (31, 12)]  # tokens, and new ones
LONG = [(300, 20)]  # past the positions at which queries are scaled


@pytest.mark.parametrize("case", CASES)
def test_generations_are_the_oracles(tmp_path, case):
    family, written, options, expected = CASES[case]
    path = write_checkpoint(tmp_path, family=family, **SMALL, **written)
    model, oracles = losart.load(path, "cpu"), family_oracles.load(path)
    rng = np.random.default_rng(7)
    for length, new in PROMPTS + (LONG if family.startswith("nemotron") else []):
        prompt = rng.integers(6, 250, length).tolist()
        for stops in ([], rng.integers(6, 310, 40).tolist()):
            found = model.generate(prompt, max_new_tokens=new, stop_token_ids=stops, **options).token_ids
            assert found == expected(oracles, prompt, new, model.config.mask_token_id, stops), (length, stops)


@pytest.mark.parametrize("case", ["sdar_moe-2", "llada2.0-2", "fast 8/4", "diffcoder", "nemotron"])
def test_logits_are_the_oracles(tmp_path, case):
    family, written, options, _ = CASES[case]
    path = write_checkpoint(tmp_path, family=family, **SMALL, **written)
    model, forward = losart.load(path, "cpu"), family_oracles.forward_of(family_oracles.load(path))
    block = next(options[n] for n in options if n.startswith("block"))
    lengths = (9, 3 * block, 300 if family.startswith("nemotron") else 40)
    family_oracles.check_logits(model, forward, lengths, block, **options)
