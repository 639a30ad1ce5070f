"""SDAR with a mixture of experts: Qwen3-MoE, trained to fill in masked blocks."""

from __future__ import annotations

from typing import Any

from losart.config.model import ExpertsConfig
from losart.loaders.families.family import ConfigFiles
from losart.loaders.families.qwen import EXPERTS, qwen_family
from losart.loaders.families.sdar import SDAR
from losart.loaders.json_files import errors_naming


def _config_values(files: ConfigFiles) -> dict[str, Any]:
    return SDAR.config_values(files) | {"experts": _experts(files)}


def _experts(files: ConfigFiles) -> ExpertsConfig:
    config = files.config
    count = config.optional_integer("num_experts")
    count = config.integer("num_local_experts") if count is None else count
    layers, step = config.integer("num_hidden_layers"), config.optional_integer("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or []
    if not (isinstance(dense, list) and all(isinstance(i, int) and 0 <= i < layers for i in dense)):
        raise config.error("mlp_only_layers", dense, f"a list of layers below {layers}")
    with errors_naming(config.file):
        return ExpertsConfig(
            count,
            per_token=config.integer("num_experts_per_tok"),
            intermediate_size=config.integer("moe_intermediate_size"),
            normalize=config.boolean("norm_topk_prob", False),
            dense_layers=frozenset(i for i in range(layers) if i in dense or (i + 1) % step),
        )


SDAR_MOE = qwen_family(_config_values, "SDARMoeForCausalLM", EXPERTS)
