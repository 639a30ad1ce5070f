"""Other families' models in transformers' own classes, and their decoding written anew, without a cache.

Every pass is a forward over all tokens under an explicit mask, but for `CachedForward`. The mask token is no
token to predict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from kept_logits import kept_logits
from numpy.typing import NDArray
from oracle import _FILE_KEYS, block_causal_mask, propose
from safetensors.torch import load_file

Forward = Callable[[Sequence[int], torch.Tensor], NDArray[np.float32]]


def load(directory: Path) -> torch.nn.Module:
    """A checkpoint of a family as a model of transformers, in float32."""
    keys = json.loads((directory / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update({name: tensor.float() for name, tensor in load_file(file).items()})
    name, renamed, extra = {
        "sdar_moe": ("Qwen3Moe", _qwen3_moe, {}),
        "Fast_dLLM_Qwen": ("Qwen2", _as_they_are, {}),
        "llama": ("Llama", _as_they_are, {}),
        "llada2_moe": ("Glm4Moe", _glm4_moe, _glm4_keys(keys)),
        "nemotron_labs_diffusion": ("Ministral3", _ministral3, {"sliding_window": None}),
    }[keys["model_type"]]
    given = {key: value for key, value in keys.items() if key not in _FILE_KEYS} | extra
    config = getattr(transformers, name + "Config")(**given)
    config._attn_implementation = "eager"
    model = getattr(transformers, name + "ForCausalLM")(config).float().eval()
    tensors = renamed(keys, tensors)
    if keys["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model


def _as_they_are(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


def _qwen3_moe(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return _stack_experts(tensors, keys["num_experts"])


def _stack_experts(tensors: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Experts as transformers has them in memory: one tensor of all."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:

        def stack(part: str, layer: str = layer) -> torch.Tensor:
            return torch.stack([tensors[f"{layer}.experts.{e}.{part}_proj.weight"] for e in range(count)])

        kept[f"{layer}.experts.gate_up_proj"] = torch.cat([stack("gate"), stack("up")], dim=1)
        kept[f"{layer}.experts.down_proj"] = stack("down")
    return kept


def _glm4_keys(keys: dict[str, Any]) -> dict[str, Any]:
    if keys["model_type"] != "llada2_moe":
        return {}
    return {
        "n_routed_experts": keys["num_experts"],
        "n_shared_experts": keys["num_shared_experts"],
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": keys["rope_theta"],
            "partial_rotary_factor": keys["partial_rotary_factor"],
        },
    }


def _glm4_moe(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dim, heads, kv_heads = (keys[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("attention.query_key_value.weight"):
            prefix = name.removesuffix("attention.query_key_value.weight")
            parts = tensor.split([heads * dim, kv_heads * dim, kv_heads * dim])
            for part, rows in zip("qkv", parts, strict=True):
                renamed[f"{prefix}self_attn.{part}_proj.weight"] = rows.clone()
            continue
        for old, new in (
            ("model.word_embeddings", "model.embed_tokens"),
            (".attention.dense.", ".self_attn.o_proj."),
            (".attention.query_layernorm.", ".self_attn.q_norm."),
            (".attention.key_layernorm.", ".self_attn.k_norm."),
            (".gate.expert_bias", ".gate.e_score_correction_bias"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    return _stack_experts(renamed, keys["num_experts"])


def _ministral3(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"diffusion_head.weight": "lm_head.weight"}
    return {names.get(name, name.replace("encoder.", "model.")): t for name, t in tensors.items()}


def forward_of(model: torch.nn.Module) -> Forward:
    """Logits [n, vocab] of one pass over ids under an additive mask."""

    @torch.no_grad()
    def forward(ids: Sequence[int], mask: torch.Tensor) -> NDArray[np.float32]:
        x = torch.tensor([list(ids)])
        positions = torch.arange(x.shape[1])[None]
        output = model(input_ids=x, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.logits[0].numpy()

    return forward


class CachedForward:
    """As `forward_of`, of blocks that see those before them, whose keys and values transformers' cache has.

    Logits are of the last block's rows alone.
    """

    def __init__(self, model: torch.nn.Module, block: int) -> None:
        self._model, self._block = model, block
        self._cache, self._ids = transformers.DynamicCache(config=model.config), list[int]()

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], mask: torch.Tensor) -> NDArray[np.float32]:
        last = (len(ids) - 1) // self._block * self._block
        same = [a == b for a, b in zip(ids[:last], self._ids, strict=False)]
        known = (same.index(False) if False in same else len(same)) // self._block * self._block
        if known < len(self._ids):
            self._cache.crop(known - len(self._ids))
        x, positions = torch.tensor([list(ids[known:])]), torch.arange(known, len(ids))[None]
        # By place: what is called past_key_values is to have another name.
        output = self._model(x, mask[:, :, known:], positions, self._cache, logits_to_keep=len(ids) - last)
        self._ids = list(ids)
        return output.logits[0].numpy()


def causal_mask(length: int, block_start: int) -> torch.Tensor:
    """Additive mask [1, 1, length, length]: causal, but all to all from `block_start` on."""
    at = torch.arange(length)
    visible = (at[None, :] <= at[:, None]) | (at[:, None] >= block_start)
    return torch.zeros(length, length).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


def _first(logits: NDArray[np.float32], mask_id: int) -> int:
    return int(propose(logits[None], mask_id)[0][0])


def _fixed(confidence: NDArray[np.float64], threshold: float, reaches: bool) -> NDArray[np.bool_]:
    """All above the threshold, and the most confident one."""
    fixed = confidence >= threshold if reaches else confidence > threshold
    fixed[confidence.argmax()] = True
    return fixed


def _evenly(confidence: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """The most confident ones."""
    return np.isin(np.arange(len(confidence)), np.argsort(-confidence, kind="stable")[:count])


def _cut(tokens: list[int], new: int, stops: Sequence[int]) -> list[int]:
    tokens = tokens[:new]
    found = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: found[0] + 1] if found else tokens


def fast_dllm(
    forward: Forward,
    prompt: Sequence[int],
    new: int,
    *,
    block: int,
    sub_block: int,
    threshold: float,
    mask_id: int,
    stops: Sequence[int] = (),
) -> list[int]:
    """Fast-dLLM v2's procedure without its block cache; prompts of one block are prefilled as longer ones.

    `forward` need not give logits of others than the last block's rows.
    """
    x, length = list(prompt), len(prompt)

    def logits() -> NDArray[np.float32]:
        return forward(x, block_causal_mask(len(x), block))

    if length % block == 0:
        x.append(_first(logits()[-1], mask_id))
    while len(x) - length < new and not set(stops) & set(x[length:]):
        known, start = len(x), len(x) // block * block
        masked = list(range(known, start + block))
        x += [mask_id] * len(masked)

        for first in range(start, start + block, sub_block):
            while open_ := [i for i in masked if i < first + sub_block]:
                if set(stops) & set(x[known : masked[0]]):
                    return _cut(x[length : masked[0]], new, stops)
                ids, confidence, _ = propose(logits()[[i - 1 - len(x) for i in open_]], mask_id)
                for i, fixed, token in zip(open_, _fixed(confidence, threshold, False), ids, strict=True):
                    if fixed:
                        x[i] = int(token)
                        masked.remove(i)
        if set(stops) & set(x[length:]):
            break
        x.append(_first(logits()[-1], mask_id))
    return _cut(x[length:], new, stops)


def stable_diffcoder(
    forward: Forward,
    prompt: Sequence[int],
    new: int,
    *,
    block: int,
    steps: int,
    threshold: float | None,
    mask_id: int,
    stops: Sequence[int] = (),
) -> list[int]:
    """Stable-DiffCoder's procedure; `steps` are those of a block."""
    length, total = len(prompt), len(prompt) + new
    x = list(prompt) + [mask_id] * new
    masked = set(range(length, total))
    for start in range(length // block * block, total, block):
        end = min(start + block, total)
        base, more = divmod(len([i for i in masked if i < end]), steps)
        for step in range(steps):
            open_ = sorted(i for i in masked if i < end)
            if not open_:
                break
            logits = forward(x[:end], block_causal_mask(end, block))
            ids, confidence, _ = propose(logits[open_], mask_id)
            fixed = (
                _evenly(confidence, base + (step < more))
                if threshold is None
                else (_fixed(confidence, threshold, True))
            )
            for i, take, token in zip(open_, fixed, ids, strict=True):
                if take:
                    x[i] = int(token)
                    masked.remove(i)
        if set(stops) & set(x[length:end]):
            return _cut(x[length:end], new, stops)
    return x[length:]


def llada2_1(
    forward: Forward,
    prompt: Sequence[int],
    new: int,
    *,
    block: int,
    threshold: float,
    editing_threshold: float,
    max_post_steps: int,
    mask_id: int,
    stops: Sequence[int] = (),
) -> list[int]:
    """LLaDA2.1's procedure, with its mask as it was meant."""
    length = len(prompt)
    total = -(-(length + new) // block) * block
    x = np.array(list(prompt) + [mask_id] * (total - length))
    masked = np.arange(total) >= length
    for start in range(length // block * block, total, block):
        end, post = start + block, 0
        at = np.arange(max(start, length), end)
        while True:
            was_masked = masked[at].copy()
            if not was_masked.any():
                post += 1
                if post > max_post_steps:
                    break
            logits = forward(x[:end].tolist(), block_causal_mask(end, block))
            ids, confidence, _ = propose(logits[at], mask_id)
            if was_masked.any():
                rows = at[was_masked]
                fixed = rows[_fixed(confidence[was_masked], threshold, False)]
                x[fixed] = ids[fixed - at[0]]
                masked[fixed] = False
            edits = ~was_masked & (confidence > editing_threshold) & (ids != x[at])
            x[at[edits]] = ids[edits]
            if not was_masked.any() and not edits.any():
                break
        if set(stops) & set(x[length:end].tolist()):
            break
    return _cut(x[length:end].tolist(), new, stops)


def nemotron(
    forward: Forward,
    prompt: Sequence[int],
    new: int,
    *,
    block: int,
    threshold: float | None,
    mask_id: int,
    steps: int = 1,
    stops: Sequence[int] = (),
) -> list[int]:
    """Nemotron-Labs-Diffusion's procedure; `steps` are those of a block, without a threshold."""
    x, length = list(prompt), len(prompt)
    while True:
        x.append(_first(forward(x, causal_mask(len(x), len(x)))[-1], mask_id))
        if len(x) - length >= new or set(stops) & set(x[length:]):
            break
        start = len(x) - 1
        x += [mask_id] * (block - 1)
        masked = list(range(start + 1, start + block))
        base, more, step = *divmod(block - 1, steps), 0
        while masked:
            ids, confidence, _ = propose(forward(x, causal_mask(len(x), start))[masked], mask_id)
            taken = (
                _evenly(confidence, base + (step < more))
                if threshold is None
                else (_fixed(confidence, threshold, True))
            )
            fixed, step = [i for i, take in zip(masked, taken, strict=True) if take], step + 1
            for i, token in zip(list(masked), ids, strict=True):
                if i in fixed:
                    x[i] = int(token)
            masked = [i for i in masked if i not in fixed]
        if len(x) - length >= new or set(stops) & set(x[length:]):
            break
    return _cut(x[length:], new, stops)


def check_logits(model: Any, forward: Forward, lengths: Sequence[int], block: int, **options: Any) -> None:
    """As `check_logits_after`, of random prompts of these lengths."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(6, 250, length).tolist() for length in lengths]
    check_logits_after(prompts, model, forward, block, max_new_tokens=40, **options)


def check_logits_after(
    prompts: Sequence[list[int]], model: Any, forward: Forward, block: int, **options: Any
) -> None:
    """See that the logits of every pass of generations are those of forwards under the mask."""
    with kept_logits(model._engine.runner) as seen:
        for prompt in prompts:
            seen.clear()
            tokens = prompt + model.generate(prompt, stop_token_ids=[], **options).token_ids
            assert seen
            for start, ids, proposed, kind, logits in seen:
                x = tokens[:start] + ids
                mask = block_causal_mask(len(x), block)
                if model.config.decoding.causal:
                    mask = causal_mask(len(x), start if kind.denoises else len(x))
                expected = forward(x, mask)[-len(ids) :][proposed]
                expected[:, model.config.mask_token_id] = -np.inf
                np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-4)
