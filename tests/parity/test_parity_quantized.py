"""The package compressed-tensors, and transformers with it, read and write the same matrices as we do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import losart
from losart.eval import TASKS
from losart.eval.questions import make_questions
from losart.loaders import QuantizedTensor, open_checkpoint
from losart.measure.random_checkpoint import write_checkpoint
from losart.quantization import WeightFormat, quantize_checkpoint

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("compressed_tensors", reason="the oracle needs compressed-tensors")

import oracle
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.parity

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4, groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4, groups, zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int8, packed, channels, zeros": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8, channels": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8, groups, zeros": (
        "int-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "float8, one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float8, channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float8, blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
    ),
}


def shape_of_scales(weight: torch.Tensor, args: QuantizationArgs) -> tuple[int, ...]:
    rows, columns = weight.shape
    block = args.block_structure or (0, 0)
    return {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, columns // (args.group_size or 1)),
        "block": (-(-rows // (block[0] or 1)), -(-columns // (block[1] or 1))),
    }[str(getattr(args.strategy, "value", args.strategy))]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matrices_are_those_that_it_decompresses(tmp_path: Path, case: str, dtype: str) -> None:
    format, weights = CASES[case]
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)
    directory = write_checkpoint(
        tmp_path, hidden_size=64, intermediate_size=96, num_layers=1, head_dim=16, dtype=dtype
    )
    torch.manual_seed(0)
    tensors, expected = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        shape, top = (
            shape_of_scales(weight, args),
            240.0 if args.type == "float" else 2 ** (args.num_bits - 1),
        )
        scale = (weight.abs().max() / top * (0.5 + torch.rand(shape))).to(weight.dtype)
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            half = 2 ** (args.num_bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, shape).to(torch.int8)
        compressed = compressor.compress(state, scheme)
        expected[name] = compressor.decompress(compressed, scheme)["weight"]
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{end}": part.contiguous() for end, part in compressed.items()}
    save_file(tensors, directory / "model.safetensors")
    keys = json.loads((directory / "config.json").read_text())
    keys["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    (directory / "config.json").write_text(json.dumps(keys))
    found = {tensor.name: tensor for tensor in open_checkpoint(directory).tensors.values()}
    assert expected
    for name, weight in expected.items():
        values = torch.from_numpy(np.ascontiguousarray(found[name].float32(0, weight.shape[0])))
        assert torch.equal(values.to(weight.dtype), weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_transformers_reads_what_was_quantized(tmp_path: Path, format: str, dtype: str) -> None:
    """All matrices of a model whose head has another format than its layers."""
    source = write_checkpoint(
        tmp_path / "source", hidden_size=64, intermediate_size=128, num_layers=1, head_dim=16, dtype=dtype
    )
    directory = quantize_checkpoint(
        open_checkpoint(source), tmp_path / "new", WeightFormat.by_default(format), WeightFormat("int8")
    )
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    model = transformers.Qwen3ForCausalLM.from_pretrained(directory, dtype="auto")
    model(torch.tensor([[1, 2, 3]]))  # in whose course the matrices are decompressed
    parameters, checked = dict(model.named_parameters()), 0
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "sdar"}))
    for tensor in open_checkpoint(directory).tensors.values():
        if isinstance(tensor, QuantizedTensor):
            values = torch.from_numpy(np.ascontiguousarray(tensor.float32(0, tensor.shape[0])))
            assert torch.equal(values.to(getattr(torch, dtype)), parameters[tensor.name].detach())
            checked += 1
    assert checked == 8


@pytest.mark.parametrize("format", ["int4, calibrated", "int8"])
def test_a_quantized_model_answers_as_in_transformers(tmp_path: Path, format: str) -> None:
    """The small checkpoint, whose answers are sure enough for the same tokens from rounded activations."""
    source = Path(losart.__file__).parent / "small_checkpoint"
    plain = losart.load(source, "cpu", "float32")
    calibration = None
    if "calibrated" in format:
        calibration = tmp_path / "text"
        texts = [next(make_questions(plain, task, 1024, 1, 7, "symbols")).prompt for task in TASKS.values()]
        calibration.write_text("\n".join(texts))
    weights = WeightFormat.by_default(format.split(",")[0])
    directory = quantize_checkpoint(
        open_checkpoint(source), tmp_path / "new", weights, calibration=calibration
    )
    config = json.loads((directory / "config.json").read_text())
    qwen = config | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    model = losart.load(directory, "cpu", "float32")
    (directory / "config.json").write_text(json.dumps(qwen))
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    options: dict[str, Any] = {
        "remasking": "low_confidence_dynamic",
        "denoising_steps": 16,
        "max_new_tokens": 16,
    }
    options |= {"confidence_threshold": 0.85, "eb_threshold": 0.35}
    for task in ("keys-2", "chain-2"):
        question = next(make_questions(plain, TASKS[task], 256, 1, 2, "symbols"))
        expected = oracle.generate_with(
            theirs,
            plain.tokenizer.encode(question.prompt),
            **options,
            block_length=plain.config.block_length,
            mask_token_id=plain.config.mask_token_id,
            stop_token_ids=plain.config.end_token_ids,
        )
        assert model.generate(question.prompt, **options).token_ids == expected
