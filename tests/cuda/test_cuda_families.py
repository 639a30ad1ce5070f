"""Every family's generations on the device are those of the CPU, with all attention methods."""

from __future__ import annotations

import numpy as np
import pytest
from families import FAMILIES, METHODS, SMALL

import losart
from losart.measure.random_checkpoint import write_checkpoint

pytestmark = pytest.mark.gpu

LENGTHS = (1, 5, 8, 16, 30, 47, 300)


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(6, 250, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    name, options = FAMILIES[request.param]
    path = write_checkpoint(tmp_path_factory.mktemp(name), family=name, **SMALL)
    models = [losart.load(path, device, deterministic=True) for device in ("cpu", "cuda")]
    return models, options | {"max_new_tokens": 21, "stop_token_ids": []}


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_the_cpu(pair, method):
    models, options = pair
    options = options | METHODS[method]
    expected = [models[0].generate(prompt, **options).token_ids for prompt in prompts()]
    assert [models[1].generate(prompt, **options).token_ids for prompt in prompts()] == expected
    for _ in range(2):  # launched one by one, and captured
        assert [one.token_ids for one in models[1].generate(prompts(), **options)] == expected


def test_drawn_tokens_are_those_of_the_cpu(pair):
    models, options = pair
    options = options | {"temperature": 0.8, "seed": 5}
    expected = [models[0].generate(prompt, **options).token_ids for prompt in prompts()]
    assert [one.token_ids for one in models[1].generate(prompts(), **options)] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_16_bits_run(tmp_path, name, dtype, kv):
    family, options = FAMILIES[name]
    sizes = SMALL | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    path = write_checkpoint(tmp_path, family=family, dtype=dtype, **sizes)
    model = losart.load(path, "cuda", kv=kv)
    for method in ("dense", "losa"):
        own = options | METHODS[method] | {"max_new_tokens": 40, "stop_token_ids": []}
        results = model.generate(prompts(), **own)
        assert all(len(one.token_ids) == 40 for one in results)
