"""SDAR and TraDo, dense: Qwen3, trained to fill in masked blocks."""

from __future__ import annotations

from typing import Any

from losart.loaders.families.family import ConfigFiles, Family, TensorPattern

MASK_TOKEN_ID = 151669  # of the released checkpoints


def _config_values(files: ConfigFiles) -> dict[str, Any]:
    files.refuse_unsupported()
    return files.common_values() | {
        "attention_bias": files.config.boolean("attention_bias", False),
        "block_length": files.block_length("block_length", "block_size"),
        "mask_token_id": files.mask_token_id(default=MASK_TOKEN_ID),
        "end_token_ids": files.end_token_ids(),
    }


SDAR = Family(
    config_values=_config_values,
    model=(
        TensorPattern("embed", "model.embed_tokens.weight", ("vocab", "hidden")),
        TensorPattern("final_norm", "model.norm.weight", ("hidden",)),
    ),
    head=TensorPattern("head", "lm_head.weight", ("vocab", "hidden")),
    layer_prefix="model.layers.{i}.",
    layer=(
        TensorPattern("input_norm", "input_layernorm.weight", ("hidden",)),
        TensorPattern("q", "self_attn.q_proj.weight", ("q", "hidden")),
        TensorPattern("k", "self_attn.k_proj.weight", ("kv", "hidden")),
        TensorPattern("v", "self_attn.v_proj.weight", ("kv", "hidden")),
        TensorPattern("o", "self_attn.o_proj.weight", ("hidden", "q")),
        TensorPattern("q_norm", "self_attn.q_norm.weight", ("head_dim",)),
        TensorPattern("k_norm", "self_attn.k_norm.weight", ("head_dim",)),
        TensorPattern("post_norm", "post_attention_layernorm.weight", ("hidden",)),
        TensorPattern("gate", "mlp.gate_proj.weight", ("ffn", "hidden")),
        TensorPattern("up", "mlp.up_proj.weight", ("ffn", "hidden")),
        TensorPattern("down", "mlp.down_proj.weight", ("hidden", "ffn")),
    ),
    attention_biases=(
        TensorPattern("q_bias", "self_attn.q_proj.bias", ("q",)),
        TensorPattern("k_bias", "self_attn.k_proj.bias", ("kv",)),
        TensorPattern("v_bias", "self_attn.v_proj.bias", ("kv",)),
        TensorPattern("o_bias", "self_attn.o_proj.bias", ("hidden",)),
    ),
    harmless=("*.rotary_emb.inv_freq",),
)
