"""Logits that come to the host from a GPU: of captured passes too, and of those sequences alone that ask."""

import numpy as np
import pytest
from families import FAMILIES, SMALL
from kept_logits import kept_logits

import losart
from losart.measure.random_checkpoint import write_checkpoint

pytestmark = pytest.mark.gpu

LENGTHS = (1, 5, 16, 30, 47, 130)
SAMPLING = {"temperature": 0.7, "top_k": 20, "seed": 1}
DRAWN = [{}, SAMPLING]


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(6, 250, length).tolist() for length in LENGTHS]


def options_of(index):
    """Some ask, some sample."""
    asked = {"logprobs": 1 + index} if index % 2 else {}
    return asked | (SAMPLING if index % 3 == 0 else {})


@pytest.fixture(scope="module", params=["sdar", *FAMILIES])
def family(request, tmp_path_factory):
    name, options = FAMILIES.get(request.param, ("sdar", {"block_length": 8}))
    path = write_checkpoint(tmp_path_factory.mktemp(name), family=name, **SMALL)
    return path, options | {"max_new_tokens": 24, "stop_token_ids": []}


@pytest.mark.parametrize("sampling", DRAWN, ids=str)
def test_they_are_those_of_the_cpu(family, sampling):
    path, options = family
    cpu, cuda = (losart.load(path, device, "float32") for device in ("cpu", "cuda"))
    for prompt in prompts():
        for _ in range(3):  # launched, captured, replayed
            expected, found = (
                model.generate(prompt, logprobs=4, **options, **sampling) for model in (cpu, cuda)
            )
            assert found.token_ids == expected.token_ids
            for one, other in zip(found.logprobs, expected.logprobs, strict=True):
                assert (one.token, one.pass_number) == (other.token, other.pass_number)
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
                top, best = ([logprob for _, logprob in x.top] for x in (one, other))
                assert top == pytest.approx(best, abs=1e-3)


def test_who_asks_changes_nothing_for_others(family):
    path, options = family
    model = losart.load(path, "cuda", "float32", deterministic=True)
    plain = [
        model.generate(prompt, **options | options_of(index) | {"logprobs": None})
        for index, prompt in enumerate(prompts())
    ]
    alone = [model.generate(prompt, **options | options_of(index)) for index, prompt in enumerate(prompts())]
    for _ in range(3):
        engine = losart.Engine(model)
        streams = [
            engine.submit(prompt, **options | options_of(index)) for index, prompt in enumerate(prompts())
        ]
        results = [stream.result() for stream in streams]
        assert [one.token_ids for one in results] == [one.token_ids for one in plain]
        assert [one.logprobs for one in results] == [one.logprobs for one in alone]
        assert [one.logprobs is None for one in results] == [not index % 2 for index in range(len(results))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("attention", [{}, {"attention": "losa", "budget": 16}])
def test_greedy_tokens_are_the_most_probable_ones(tiny_checkpoint, dtype, attention):
    """Of several sequences together, whose commits ride, with captured passes and without."""
    model = losart.load(tiny_checkpoint, "cuda", dtype)
    options = {"max_new_tokens": 24, "block_length": 8, "stop_token_ids": [], **attention}
    for _ in range(3):
        for result in model.generate(prompts(), logprobs=2, **options):
            assert all(one.token == one.top[0][0] for one in result.logprobs)


def test_passes_without_are_captured_apart(tiny_checkpoint):
    """And launch no more for it: their graphs hold no logits."""
    model = losart.load(tiny_checkpoint, "cuda")
    runner = model._engine.runner.backend.runner
    options = {"max_new_tokens": 24, "block_length": 8, "stop_token_ids": []}
    prompt = prompts()[3]
    for _ in range(2):
        model.generate(prompt, **options)
    without = dict(runner.passes)
    assert any(without.values()) and all(one.logits is None for one in without.values() if one)
    for _ in range(2):
        model.generate(prompt, logprobs=0, **options)
    asked = [one for key, one in runner.passes.items() if key not in without and one]
    assert asked and all(one.logits is not None for one in asked if one.proposes)
    assert all(runner.passes[key] is one for key, one in without.items())
    room = {one.logits.data.mem.ptr for one in asked if one.proposes}
    assert len(room) == 1  # one array for all


def test_only_rows_that_are_asked_for_come_to_the_host(tiny_checkpoint, monkeypatch):
    from losart.backends.cuda.batch import DeviceBatch

    model, rows = losart.load(tiny_checkpoint, "cuda"), []
    fetch = DeviceBatch.fetch_logits

    def fetch_and_count(self, logits, stream):
        found = fetch(self, logits, stream)
        asking = [one for one in self.sequences if one.keeps_logits]
        assert len(found) == sum(len(one.proposed) for one in asking)
        rows.append((len(self.sequences), len(asking)))
        return found

    monkeypatch.setattr(DeviceBatch, "fetch_logits", fetch_and_count)
    engine = losart.Engine(model)
    options = {"max_new_tokens": 16, "block_length": 8, "stop_token_ids": []}
    streams = [
        engine.submit(prompt, **options, **({"logprobs": 0} if index == 2 else {}))
        for index, prompt in enumerate(prompts())
    ]
    for stream in streams:
        stream.result()
    assert rows and all(asking <= 1 for _, asking in rows) and max(rows)[0] > 1


@pytest.mark.parametrize("planner", ["device", "host"])
def test_logits_of_several_are_given_to_whom_they_belong(tiny_checkpoint, planner):
    """Every row of every pass: its maximum is what was proposed."""
    model = losart.load(tiny_checkpoint, "cuda", "float32")
    options = {"attention": "losa", "budget": 32, "planner": planner, "max_new_tokens": 16}
    options |= {"block_length": 8, "stop_token_ids": []}
    expected = [one.token_ids for one in model.generate(prompts(), **options)]
    with kept_logits(model._engine.runner) as seen:
        found = [one.token_ids for one in model.generate(prompts(), **options)]
    assert found == expected
    assert all(
        len(one.logits) == len(one.proposed) and np.isfinite(one.logits.max(axis=1)).all() for one in seen
    )


def test_scores_are_those_of_the_cpu(family):
    path, options = family
    sizes = {name: size for name, size in options.items() if name in ("block_length", "block_size")}
    cpu, cuda = (losart.load(path, device, "float32") for device in ("cpu", "cuda"))
    continuations = [prompt[:11] for prompt in prompts()[::-1]]
    for samples in (None, 2):
        expected, found = (
            model.score(prompts(), continuations, samples=samples, **sizes) for model in (cpu, cuda)
        )
        for one, other in zip(found, expected, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=2e-3)
            assert one.token_ids == other.token_ids
