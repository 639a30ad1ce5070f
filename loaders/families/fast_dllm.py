"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2, trained to fill in blocks, by rows that predict the next token."""

from __future__ import annotations

from typing import Any

from losart.config.decoding import Decoding
from losart.loaders.families.family import ConfigFiles
from losart.loaders.families.qwen import qwen_family

BLOCK_LENGTH, SUB_BLOCK_LENGTH = 32, 8
MASK_TOKEN, MASK_TOKEN_ID = "|<MASK>|", 151665  # not what the tokenizer calls its mask token
END_TOKEN_ID = 151645
DECODING = Decoding(
    shifted=True,
    seeds=True,
    defaults=(
        ("remasking", "low_confidence_dynamic"),
        ("confidence_threshold", 1.0),
        ("sub_block_length", SUB_BLOCK_LENGTH),
        ("top_p", 0.95),
    ),
    names=(
        ("block_size", "block_length"),
        ("small_block_size", "sub_block_length"),
        ("threshold", "confidence_threshold"),
        ("mask_id", "mask_token_id"),
    ),
)


def _config_values(files: ConfigFiles) -> dict[str, Any]:
    files.refuse_unsupported()
    return files.common_values() | {
        "head_norms": False,
        "qkv_bias": True,
        "block_length": files.block_length("bd_size", "block_size") or BLOCK_LENGTH,
        "mask_token_id": files.mask_token_id(default=MASK_TOKEN_ID, token=MASK_TOKEN),
        "end_token_ids": files.end_token_ids(default=(END_TOKEN_ID,), listed=False),
    }


FAST_DLLM = qwen_family(_config_values, "Fast_dLLM_QwenForCausalLM", decoding=DECODING)
