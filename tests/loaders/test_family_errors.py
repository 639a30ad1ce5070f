"""What a family's checkpoint may be wrong in: one error of losart's own, naming file and key or tensor."""

from __future__ import annotations

import json

import numpy as np
import pytest
from families import SMALL
from safetensors.numpy import load_file, save_file

import losart
from losart.errors import ConfigError, TensorError
from losart.loaders import open_checkpoint
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import WeightFormat, quantize_checkpoint

MOE = "model.layers.1.mlp."


def with_config(path, **changes):
    keys = json.loads((path / "config.json").read_text()) | changes
    kept = {key: value for key, value in keys.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))
    return path


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sdar_moe", {"num_experts": ...}, "missing key 'num_local_experts'"),
        ("sdar_moe", {"num_experts": 0}, "num_experts must be an integer from 1"),
        ("sdar_moe", {"num_experts_per_tok": 9}, "9 per token are more than the 8 that it chooses from"),
        ("sdar_moe", {"num_experts_per_tok": "2"}, "num_experts_per_tok must be an integer"),
        ("sdar_moe", {"moe_intermediate_size": ...}, "missing key 'moe_intermediate_size'"),
        ("sdar_moe", {"mlp_only_layers": [7]}, "mlp_only_layers must be a list of layers below 3"),
        ("sdar_moe", {"mlp_only_layers": "all"}, "mlp_only_layers must be a list of layers"),
        ("sdar_moe", {"architectures": ["SDARForCausalLM"]}, "'SDARForCausalLM', which is not of model_type"),
        ("sdar_moe", {"use_sliding_window": True}, "use_sliding_window is not supported"),
        ("llada2_moe", {"n_group": 3}, "16 experts cannot be in 3 groups"),
        ("llada2_moe", {"topk_group": 5}, "16 experts cannot be in 4 groups of which 5 are kept"),
        ("llada2_moe", {"n_group": 16, "topk_group": 8}, "groups of 1 have no two highest scores"),
        ("llada2_moe", {"score_function": "softmax"}, "score_function must be 'sigmoid'"),
        ("llada2_moe", {"num_shared_experts": 2}, "num_shared_experts must be 0 or 1"),
        ("llada2_moe", {"routed_scaling_factor": "2"}, "routed_scaling_factor must be a number"),
        ("llada2_moe", {"use_qkv_bias": True}, "use_qkv_bias is not supported"),
        ("llada2_moe", {"use_bias": True}, "use_bias is not supported"),
        ("llada2_moe", {"norm_head": True}, "norm_head is not supported"),
        ("llada2_moe", {"rotary_dim": 8}, "rotary_dim must be partial_rotary_factor times"),
        ("llada2_moe", {"partial_rotary_factor": 0.05}, "of a head's 32 channels 1 cannot be rotated"),
        ("llada2_moe", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ("Fast_dLLM_Qwen", {"bd_size": 0}, "bd_size must be an integer from 1"),
        ("Fast_dLLM_Qwen", {"mask_token_id": 999}, "mask_token_id must be inside the vocabulary of 320"),
        ("Fast_dLLM_Qwen", {"use_sliding_window": True}, "use_sliding_window is not supported"),
        ("stable_diffcoder", {"architectures": ["LlamaForCausalLM"]}, "'llama' predicts the next token"),
        ("stable_diffcoder", {"architectures": ...}, "'llama' predicts the next token"),
        ("stable_diffcoder", {"model_type": "sdar"}, "which is not of model_type 'sdar'"),
        ("nemotron_labs_diffusion", {"vision_config": {}}, "vision_config is not supported"),
        ("nemotron_labs_diffusion", {"sliding_window": 4096}, "sliding_window is not supported"),
        (
            "nemotron_labs_diffusion",
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": -1}},
            "llama_4_scaling_beta must be a number, 0 or more",
        ),
    ],
)
def test_a_configuration_that_is_wrong(tmp_path, family, changes, message):
    path = with_config(write_checkpoint(tmp_path, family=family, **SMALL), **changes)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        open_checkpoint(path)


def changed(tensors, name, value=None):
    tensors = dict(tensors)
    del tensors[name]
    return tensors if value is None else tensors | {name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: changed(t, f"{MOE}experts.5.up_proj.weight"), r"missing tensors: .*experts\.5\.up_proj"),
        (lambda t: changed(t, f"{MOE}gate.weight"), r"missing tensors: .*mlp\.gate\.weight"),
        (lambda t: changed(t, f"{MOE}gate.expert_bias"), r"missing tensors: .*gate\.expert_bias"),
        (
            lambda t: t | {f"{MOE}experts.16.up_proj.weight": t[f"{MOE}experts.5.up_proj.weight"]},
            r"unknown tensors: .*experts\.16\.up_proj",
        ),
        (
            lambda t: changed(t, f"{MOE}experts.5.up_proj.weight", np.zeros((48, 64), np.float32)),
            r"experts\.5\.up_proj\.weight' has the shape \[48, 64\]; config\.json asks for \[64, 64\]",
        ),
        (
            lambda t: changed(t, f"{MOE}gate.expert_bias", np.zeros(15, np.float32)),
            r"expert_bias' has the shape \[15\]",
        ),
        (
            lambda t: changed(t, f"{MOE}gate.expert_bias", np.zeros(16, np.int32)),
            r"expert_bias' has the dtype ",
        ),
        (
            lambda t: changed(t, "model.layers.0.attention.query_key_value.weight", np.zeros((5, 64), "f4")),
            r"query_key_value\.weight' has the shape \[5, 64\]",
        ),
    ],
)
def test_tensors_that_are_wrong(tmp_path, change, message):
    path = write_checkpoint(tmp_path, family="llada2_moe", **SMALL)
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(TensorError, match=message):
        open_checkpoint(path)


def test_a_router_that_is_not_finite_is_an_error_of_the_pass(tmp_path):
    path = write_checkpoint(tmp_path, family="sdar_moe", **SMALL)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(changed(tensors, f"{MOE}gate.weight", np.full((8, 64), np.nan, np.float32)), file)
    with pytest.raises(losart.NumericalError, match="logits are not finite"):
        losart.generate(path, list(range(9)), device="cpu", max_new_tokens=4)


def test_quantized_experts_are_held_so_on_the_cpu(tmp_path):
    source = write_checkpoint(tmp_path / "source", family="sdar_moe", dtype="bfloat16", **SMALL)
    quantize_checkpoint(open_checkpoint(source), tmp_path / "int8", WeightFormat("int8"))
    models = losart.load(source, "cpu", weights="int8"), losart.load(tmp_path / "int8", "cpu")
    for model in models:
        assert {"bfloat16", "int8"} == set(model.matrix_bytes)  # routers and the embedding stay
    prompt, options = list(range(20)), {"max_new_tokens": 8, "stop_token_ids": []}
    models[1]._engine.runner.head = models[0]._engine.runner.head
    found, expected = (model.generate(prompt, **options).token_ids for model in models)
    assert found == expected
