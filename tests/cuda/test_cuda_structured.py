"""Answers that follow a grammar, with the logits of a GPU: those of the CPU, and what schemas describe."""

from __future__ import annotations

import pytest
from families import FAMILIES, METHODS, SMALL

import losart
from losart.measure.random_checkpoint import write_checkpoint

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")
from schemas import check, fault, random_schema

pytestmark = pytest.mark.gpu

SIZES = SMALL | {"tokenizer": True}
OPTIONS = {"max_new_tokens": 40, "block_length": 8}
ASKED = [
    OPTIONS | {"json_schema": random_schema(3)},
    OPTIONS,
    OPTIONS | {"regex": "[a-f]{3,30}!", "temperature": 1.0, "seed": 3},
    OPTIONS | {"temperature": 1.0, "seed": 3},
    OPTIONS | {"grammar": 'start: NUM ("+" NUM)*\nNUM: /[0-9]{1,3}/', "denoising_steps": 3},
    OPTIONS | {"json_schema": {"type": "object"}, "attention": "losa", "budget": 16},
]
PROMPTS = [[5 + number] * (3 + 7 * number) for number in range(len(ASKED))]


@pytest.mark.parametrize("name", ["sdar", *FAMILIES])
def test_tokens_are_those_of_the_cpu(tmp_path, name):
    """Alone and in passes that some share with others which have no grammar; launched, and captured."""
    family = FAMILIES[name][0] if name in FAMILIES else name
    path = write_checkpoint(tmp_path, family=family, **SIZES)
    cpu, cuda = (losart.load(path, device, deterministic=True) for device in ("cpu", "cuda"))
    expected = [cpu.generate(prompt, **one).token_ids for prompt, one in zip(PROMPTS, ASKED, strict=True)]
    for _ in range(2):
        alone = [cuda.generate(prompt, **one).token_ids for prompt, one in zip(PROMPTS, ASKED, strict=True)]
        assert alone == expected
        engine = losart.Engine(cuda)
        streams = [engine.submit(prompt, **one) for prompt, one in zip(PROMPTS, ASKED, strict=True)]
        assert [stream.result().token_ids for stream in streams] == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_what_schemas_describe(tmp_path, dtype, method):
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    model = losart.load(write_checkpoint(tmp_path, dtype=dtype, **sizes), "cuda")
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 300, "block_length": 8, "temperature": temperature}
        ended = check(model, range(24), **options, **METHODS[method])
        assert ended["stop"] >= 12


def test_a_vocabulary_of_a_released_model(tmp_path):
    """Whose logits are many, and whose tokenizer has fewer tokens than the model."""
    path = write_checkpoint(tmp_path, vocab_size=151936, dtype="bfloat16", **SIZES)
    model, schema = losart.load(path, "cuda"), random_schema(5)
    for temperature in (0.0, 0.8):
        options = {"max_new_tokens": 300, "block_length": 32, "temperature": temperature, "seed": 1}
        assert fault(schema, model.generate([5] * 40, json_schema=schema, **options)) is None
