"""Greedy block-diffusion generation with transformers' Qwen3: slow, without a cache, and not ours.

Every pass is a full forward over all tokens up to the end of the block, under an explicit
block-causal mask. The procedure is that of SDAR's public generate.py (arXiv 2510.06303).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reference import remask, transfer_counts
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

# Keys of a checkpoint's config.json that describe the file and not the model.
_FILE_KEYS = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def load(checkpoint_dir: str | Path) -> Qwen3ForCausalLM:
    """An SDAR checkpoint as a Qwen3 model, whatever its dtype in float32."""
    directory = Path(checkpoint_dir)
    keys = json.loads((directory / "config.json").read_text())
    config = Qwen3Config(**{key: value for key, value in keys.items() if key not in _FILE_KEYS})
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config).float().eval()

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return model


def block_causal_mask(length: int, block_length: int) -> torch.Tensor:
    """Additive mask [1, 1, length, length]: 0 within a block and to every earlier one."""
    block = torch.arange(length) // block_length
    mask = torch.zeros(length, length)
    mask[block[:, None] < block[None, :]] = torch.finfo(torch.float32).min
    return mask[None, None]


@torch.no_grad()
def forward(model: Qwen3ForCausalLM, ids: Sequence[int], block_length: int) -> NDArray[np.float32]:
    """Logits [n, vocab] of one block-causal pass over `ids`."""
    x = torch.tensor([list(ids)])
    return (
        model(
            input_ids=x,
            attention_mask=block_causal_mask(x.shape[1], block_length),
            position_ids=torch.arange(x.shape[1])[None],
            use_cache=False,
        )
        .logits[0]
        .numpy()
    )


def logits(checkpoint_dir: str | Path, ids: Sequence[int], block_length: int) -> NDArray[np.float32]:
    """Logits [n, vocab] of one block-causal pass of the checkpoint over `ids`."""
    return forward(load(checkpoint_dir), ids, block_length)


def propose(
    rows: NDArray[np.float32], mask_token_id: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The likeliest token of each row, its probability, and the entropy of the whole distribution.

    The mask token is no token to predict: it is taken out before the softmax.
    """
    scores = np.delete(rows.astype(np.float64), mask_token_id, axis=1)
    tokens = np.delete(np.arange(rows.shape[1]), mask_token_id)
    log_p = scores - scores.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    return tokens[p.argmax(axis=1)], p.max(axis=1), -(p * log_p).sum(axis=1)


def generate(checkpoint_dir: str | Path, prompt_ids: Sequence[int], **options: Any) -> list[int]:
    """What `generate_with` does, with an SDAR checkpoint."""
    return generate_with(load(checkpoint_dir), prompt_ids, **options)


def generate_with(
    model: Qwen3ForCausalLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    block_length: int,
    denoising_steps: int,
    remasking: str,
    confidence_threshold: float,
    eb_threshold: float,
    mask_token_id: int,
    stop_token_ids: Sequence[int],
) -> list[int]:
    """The new tokens of a greedy generation, cut to `max_new_tokens` and after the first stop token."""
    prompt = list(prompt_ids)
    blocks = math.ceil((len(prompt) + max_new_tokens) / block_length)
    x = np.full(blocks * block_length, mask_token_id)
    x[: len(prompt)] = prompt
    masked = np.arange(len(x)) >= len(prompt)

    for start in range(len(prompt) // block_length * block_length, len(x), block_length):
        end = start + block_length
        for step, count in enumerate(transfer_counts(block_length, denoising_steps)):
            left = masked[start:end]
            if not left.any():
                break
            ids, confidence, entropy = propose(forward(model, x[:end], block_length)[start:], mask_token_id)
            if step == denoising_steps - 1:
                fixed = np.flatnonzero(left)
            else:
                fixed = remask(
                    remasking, ids, confidence, entropy, left, count, confidence_threshold, eb_threshold
                )
            x[start + fixed] = ids[fixed]
            masked[start + fixed] = False
        if set(stop_token_ids) & set(x[len(prompt) : end].tolist()):
            break

    new = x[len(prompt) :].tolist()[:max_new_tokens]
    stops = [i for i, token in enumerate(new) if token in set(stop_token_ids)]
    return new[: stops[0] + 1] if stops else new
