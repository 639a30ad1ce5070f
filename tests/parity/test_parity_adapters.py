"""Merged weights and logits are those of PEFT's merge_and_unload, on the same random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("peft", reason="the oracle needs peft")

import family_oracles
import oracle
import peft
import torch

import losart
from losart.backends.cpu.convert import float32_of
from losart.loaders import open_checkpoint
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import loaded_tensors

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "all linear, rows": {"r": 8, "target_modules": "all-linear", "trainable_token_indices": [3, 318]},
    "stabilized, patterns": {
        "r": 8,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": r".*\.(q_proj|up_proj|down_proj)",
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "up_proj": 5},
        "alpha_pattern": {"down_proj": 7, r"^model\.layers\.0\..*": 2},
        "fan_in_fan_out": True,
    },
    "some layers, modules": {
        "r": 1,
        "target_modules": ["k_proj", "mlp.gate_proj"],
        "layers_to_transform": [0, 2],
        "modules_to_save": ["norm", "lm_head"],
        "exclude_modules": ["layers.2.mlp.gate_proj"],
    },
    "embedding": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "tied embedding": {
        "target_modules": ["o_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "embedding and head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


def adapted(base: Path, directory: Path, load: Any, **config: Any) -> torch.nn.Module:
    """What PEFT makes of an adapter with random values, which it has saved and reads again."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load(base), peft.LoraConfig(**config))
    for name, values in model.named_parameters():
        if "lora_" in name or "trainable" in name or "modules_to_save" in name:
            values.data += 0.1 * torch.randn(values.shape)
    model.save_pretrained(directory)
    return peft.PeftModel.from_pretrained(load(base), directory).merge_and_unload()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", list(CASES))
def test_merged_weights_and_logits(tmp_path: Path, case: str, tied: bool) -> None:
    if tied and case == "embedding and head":
        pytest.skip("refused")
    base = write_checkpoint(tmp_path / "base", **SMALL, tied=tied)
    model = adapted(base, tmp_path / "adapter", oracle.load, **CASES[case])
    checkpoint = open_checkpoint(base, tmp_path / "adapter")
    assert checkpoint.changes
    theirs = {name: values.numpy() for name, values in model.state_dict().items()}
    for name, tensor in loaded_tensors(checkpoint, "auto", "cpu").items():
        expected = theirs[checkpoint.tensors[name].name if name in checkpoint.tensors else "lm_head.weight"]
        found = float32_of(tensor, 0, len(expected)) if expected.ndim == 2 else tensor.array()
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 300, 21)]
    options: dict[str, Any] = {"max_new_tokens": 12, "block_length": 4, "denoising_steps": 2}
    options |= {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.4}
    expected_ids = oracle.generate_with(
        model.eval(), ids, **options, eb_threshold=0.0, mask_token_id=315, stop_token_ids=[]
    )
    result = losart.generate(
        base, ids, device="cpu", adapter=tmp_path / "adapter", stop_token_ids=[], mask_token_id=315, **options
    )
    assert result.token_ids == expected_ids


def test_an_ordinary_llama_that_an_adapter_makes_fill_in_blocks(tmp_path: Path) -> None:
    """With shifted rows, as of Fast-dLLM v2."""
    import json

    base = write_checkpoint(tmp_path / "base", **SMALL, family="stable_diffcoder", tied=True)
    keys = json.loads((base / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(keys))
    config = {"r": 4, "target_modules": "all-linear", "trainable_token_indices": [315]}
    model = adapted(base, tmp_path / "adapter", family_oracles.load, **config).eval()
    conversion = {"family": "Fast_dLLM_Qwen", "block_length": 8, "mask_token_id": 315}
    (tmp_path / "adapter" / "losart.json").write_text(json.dumps(conversion))
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, 300, 21)]
    forward = family_oracles.forward_of(model)
    given = {"block": 8, "sub_block": 4, "threshold": 0.3, "mask_id": 315}
    expected = family_oracles.fast_dllm(forward, prompt, 30, **given)
    result = losart.generate(
        base,
        prompt,
        device="cpu",
        adapter=tmp_path / "adapter",
        max_new_tokens=30,
        small_block_size=4,
        threshold=0.3,
        top_p=1.0,
        stop_token_ids=[],
    )
    assert result.token_ids == expected
