"""Stable-DiffCoder (arXiv 2601.15892): Llama, trained to fill in masked blocks."""

from __future__ import annotations

from typing import Any

from losart.config.decoding import Decoding
from losart.loaders.families.family import ConfigFiles
from losart.loaders.families.qwen import qwen_family

BLOCK_LENGTH = 4
MASK_TOKEN_ID, END_TOKEN_ID = 5, 2
DECODING = Decoding(
    spreads_masked=True,
    ends_short=True,
    defaults=(("remasking", "low_confidence_static"), ("reaches_threshold", True)),
    names=(("threshold", "confidence_threshold"), ("mask_id", "mask_token_id")),
)


def _config_values(files: ConfigFiles) -> dict[str, Any]:
    files.refuse_unsupported()
    bias = files.config.boolean("attention_bias", False)
    return files.common_values() | {
        "head_norms": False,
        "qkv_bias": bias,
        "o_bias": bias,
        "block_length": files.block_length("block_length", "block_size") or BLOCK_LENGTH,
        "mask_token_id": files.mask_token_id(default=MASK_TOKEN_ID),
        "end_token_ids": files.end_token_ids(default=(END_TOKEN_ID,)),
    }


STABLE_DIFFCODER = qwen_family(_config_values, "StableDiffcoderForCausalLM", decoding=DECODING)
