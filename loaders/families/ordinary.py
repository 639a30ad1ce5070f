"""Llama, Qwen2 and Qwen3, which predict the next token: what an adapter can make fill in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from losart.loaders.families.family import ConfigFiles, Family
from losart.loaders.families.qwen import qwen_family


def _config_values(head_norms: bool, qkv_bias: bool | None) -> Callable[[ConfigFiles], dict[str, Any]]:
    """Without `qkv_bias` it is config.json that says whether the attention has biases."""

    def config_values(files: ConfigFiles) -> dict[str, Any]:
        files.refuse_unsupported()
        bias = files.config.boolean("attention_bias", False)
        return files.common_values() | {
            "head_norms": head_norms,
            "qkv_bias": bias if qkv_bias is None else qkv_bias,
            "o_bias": bias if qkv_bias is None else False,
            "end_token_ids": files.end_token_ids(),
        }

    return config_values


# By the `model_type` of config.json.
ORDINARY: dict[str, Family] = {
    "llama": qwen_family(_config_values(False, None), "LlamaForCausalLM"),
    "qwen2": qwen_family(_config_values(False, True), "Qwen2ForCausalLM"),
    "qwen3": qwen_family(_config_values(True, None), "Qwen3ForCausalLM"),
}
