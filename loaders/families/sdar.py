"""SDAR and TraDo, dense: Qwen3, trained to fill in masked blocks."""

from __future__ import annotations

from typing import Any

from losart.loaders.families.family import ConfigFiles
from losart.loaders.families.qwen import qwen_family

MASK_TOKEN_ID = 151669  # of the released checkpoints


def _config_values(files: ConfigFiles) -> dict[str, Any]:
    files.refuse_unsupported()
    bias = files.config.boolean("attention_bias", False)
    return files.common_values() | {
        "qkv_bias": bias,
        "o_bias": bias,
        "block_length": files.block_length("block_length", "block_size"),
        "mask_token_id": files.mask_token_id(default=MASK_TOKEN_ID),
        "end_token_ids": files.end_token_ids(),
    }


SDAR = qwen_family(_config_values, "SDARForCausalLM")
