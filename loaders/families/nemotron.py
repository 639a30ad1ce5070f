"""Nemotron-Labs-Diffusion: Ministral, whose prompt and finished blocks are causal."""

from __future__ import annotations

from typing import Any

from losart.config.decoding import Decoding
from losart.errors import ConfigError
from losart.loaders.families.family import ConfigFiles, Family, TensorPattern
from losart.loaders.families.qwen import ATTENTION, FEED_FORWARD, NORMS

BLOCK_LENGTH = 32
MASK_TOKEN_ID, END_TOKEN_ID = 100, 11
DECODING = Decoding(
    causal=True,
    seeds=True,
    spreads_masked=True,
    defaults=(
        ("remasking", "low_confidence_dynamic"),
        ("confidence_threshold", 0.9),
        ("reaches_threshold", True),
    ),
    names=(("threshold", "confidence_threshold"), ("steps", "denoising_steps")),
)


def _config_values(files: ConfigFiles) -> dict[str, Any]:
    files.refuse_unsupported()
    config = files.config
    for key in ("vision_config", "sliding_window"):
        if config.get(key) is not None:
            raise ConfigError(f"{config.file}: {key} is not supported")
    return files.common_values() | {
        "head_norms": False,
        "block_length": files.block_length("block_length", "block_size") or BLOCK_LENGTH,
        "mask_token_id": files.mask_token_id(default=MASK_TOKEN_ID),
        "end_token_ids": files.end_token_ids(default=(END_TOKEN_ID,)),
    }


NEMOTRON = Family(
    config_values=_config_values,
    model=(
        TensorPattern("embed", "encoder.embed_tokens.weight", ("vocab", "hidden")),
        TensorPattern("final_norm", "encoder.norm.weight", ("hidden",)),
    ),
    head=TensorPattern("head", "diffusion_head.weight", ("vocab", "hidden")),
    layer_prefix="encoder.layers.{i}.",
    layer=(*NORMS, *ATTENTION, *FEED_FORWARD),
    harmless=("*.rotary_emb.inv_freq",),
    decoding=DECODING,
)
