"""Every family's decoding with all attention methods: alone, together, by steps, in sessions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from families import FAMILIES, METHODS, SMALL
from safetensors.numpy import load_file, save_file

import losart
from losart.errors import OptionError, PromptError
from losart.measure.random_checkpoint import write_checkpoint

LENGTHS = (1, 5, 8, 16, 30, 47)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    name, options = FAMILIES[request.param]
    path = write_checkpoint(tmp_path_factory.mktemp(name), family=name, **SMALL)
    model = losart.load(path, "cpu", deterministic=True)
    return model, options | {"max_new_tokens": 21, "stop_token_ids": []}


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(6, 250, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("method", METHODS)
def test_together_they_are_what_they_are_alone(family, method):
    model, options = family
    options = options | METHODS[method]
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts()]
    assert [one.token_ids for one in model.generate(prompts(), **options)] == alone
    assert all(len(ids) == 21 for ids in alone)


def test_a_large_budget_is_dense(family):
    model, options = family
    dense = [model.generate(prompt, **options).token_ids for prompt in prompts()]
    for method in ("quest", "sparsed"):
        all_read = options | {"attention": method, "budget": 4096}
        assert [model.generate(prompt, **all_read).token_ids for prompt in prompts()] == dense


def test_a_stream_tells_what_the_result_is(family):
    model, options = family
    for prompt in prompts():
        steps = list(model.stream(prompt, **options))
        result = steps[-1].result
        assert result is not None and all(step.result is None for step in steps[:-1])
        assert result.token_ids == model.generate(prompt, **options).token_ids
        told: dict[int, int] = {}
        for step in steps:
            for row in [*step.fixed, *step.edited]:
                told[step.block_start + row] = step.block[row]
        for position, token in enumerate(result.token_ids, len(prompt)):
            assert told.get(position, token) == token


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_step_has_the_whole_text(tmp_path, name):
    """Also where a commit gave the last token: what a family's blocks begin with."""
    kind, options = FAMILIES[name]
    path = write_checkpoint(tmp_path, family=kind, **SMALL | {"tokenizer": True})
    model = losart.load(path, "cpu")
    for new in range(1, 2 * 8 + 2):
        steps = list(model.stream(list(b"What a day"), max_new_tokens=new, stop_token_ids=[], **options))
        assert steps[-1].text == steps[-1].result.text and len(steps[-1].result.token_ids) == new
        for before, after in pairwise(steps):
            assert after.text.startswith(before.text)


def test_an_observer_sees_commits_too(family):
    model, options = family
    seen = []
    result = model.generate(prompts()[3], observer=seen.append, **options)
    assert {step.kind for step in seen} >= {"first", "later", "commit"}
    assert sum(step.kind == "commit" for step in seen) == result.stats.commit_passes
    assert all(step.layers for step in seen)


def test_a_session_goes_on_after_what_it_holds(family):
    model, options = family
    session = model.session(block_length=options.get("block_length", 8))
    rest = {name: value for name, value in options.items() if not name.startswith("block")}
    prompt = prompts()[-1]
    first = session.generate(prompt, **rest).token_ids
    whole = (prompt + first)[:64]  # blocks, of all of which it has held keys and values
    for after in (prompt + first + prompts()[2], whole, whole[:48], whole[:33]):
        assert session.generate(after, **rest).token_ids == model.generate(after, **options).token_ids


def test_prompts_in_common_are_shared(family):
    model, options = family
    common = (prompts()[5] + prompts()[4])[:64]
    lists = [common, [*common, 9], common, common[:48], [*common[:48], 7, 8]]
    alone = [model.generate(prompt, **options).token_ids for prompt in lists]
    engine = losart.Engine(model, max_sequences=2)
    streams = [engine.submit(prompt, **options) for prompt in lists]
    assert [stream.result().token_ids for stream in streams] == alone
    assert engine.stats.reused_tokens > 0


def test_the_mask_is_never_proposed(tmp_path):
    for key, (name, options) in FAMILIES.items():
        path = write_checkpoint(tmp_path / key, family=name, **SMALL)
        file = path / "model.safetensors"
        tensors, mask = load_file(file), losart.load(path, "cpu").config.mask_token_id
        head = next(tensor for tensor in tensors if tensor.endswith("head.weight"))
        tensors[head][mask] = 9 * np.sign(tensors[head][mask])
        save_file(tensors, file)
        for prompt in prompts():
            ids = losart.generate(path, prompt, device="cpu", max_new_tokens=9, stop_token_ids=[], **options)
            assert len(ids.token_ids) == 9 and mask not in ids.token_ids


def test_stop_tokens_end_it_where_they_come(family):
    model, options = family
    for prompt in prompts():
        ids = model.generate(prompt, **options).token_ids
        for place in (0, 3, 11):
            found = model.generate(prompt, **options | {"stop_token_ids": [ids[place]]})
            assert found.token_ids == ids[: ids.index(ids[place]) + 1]
            assert found.finish_reason == "stop"


def test_sampling_is_the_seeds(family):
    model, options = family
    options = options | {"temperature": 1.0, "seed": 5}
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts()]
    assert [one.token_ids for one in model.generate(prompts(), **options)] == alone
    assert alone != [model.generate(p, **options | {"seed": 6}).token_ids for p in prompts()]


def test_edited_tokens_are_told(tmp_path):
    name, options = FAMILIES["llada2.1"]
    model = losart.load(write_checkpoint(tmp_path, family=name, **SMALL), "cpu")
    steps = [step for p in prompts() for step in model.stream(p, max_new_tokens=40, **options)]
    assert any(step.edited for step in steps)
    blocks: dict[int, list[int | None]] = {}
    for step in steps:
        if step.kind != "first":
            before = blocks[step.block_start]
            changed = [
                i for i, (a, b) in enumerate(zip(before, step.block, strict=True)) if a not in (b, None)
            ]
            assert step.edited == changed
        blocks[step.block_start] = step.block


def test_editing_at_threshold_0_takes_every_change_and_ends(tmp_path):
    name, options = FAMILIES["llada2.1"]
    model = losart.load(write_checkpoint(tmp_path, family=name, **SMALL), "cpu")
    result = model.generate(prompts()[2], **options | {"editing_threshold": 0.0, "max_post_steps": 2})
    blocks = result.stats.commit_passes
    assert result.stats.denoising_passes <= blocks * (8 + 2)


def test_llada_2_1_is_known_by_its_routers_bias(tmp_path):
    from safetensors.numpy import save_file

    from losart.backends.cpu.convert import widen
    from losart.loaders import open_checkpoint
    from losart.loaders.safetensors_files import map_tensors

    path = write_checkpoint(tmp_path, family="llada2_moe", dtype="float16", **SMALL)
    assert dict(open_checkpoint(path).config.decoding.defaults).get("editing_threshold") is None
    tensors = {name: tensor.array().copy() for name, tensor in map_tensors(path).items()}
    for name in tensors:
        if name.endswith("expert_bias"):
            tensors[name] = widen(tensors[name])
    save_file(tensors, path / "model.safetensors")
    assert dict(open_checkpoint(path).config.decoding.defaults)["editing_threshold"] == 0.9


def test_a_causal_models_prompt_leaves_room_for_a_block(tmp_path):
    name, options = FAMILIES["nemotron"]
    model = losart.load(write_checkpoint(tmp_path, family=name, max_positions=64, **SMALL), "cpu")
    assert len(model.generate(list(range(6, 56)), max_new_tokens=30, **options).token_ids) == 8
    with pytest.raises(PromptError, match="60 tokens leaves no room for a block"):
        model.generate(list(range(60)), **options)


def test_a_familys_names_of_options_are_its_own(tmp_path):
    name, options = FAMILIES["fast_dllm"]
    model = losart.load(write_checkpoint(tmp_path / "fast", family=name, **SMALL), "cpu")
    same = {"block_length": 8, "sub_block_length": 4, "confidence_threshold": 0.3}
    prompt = prompts()[1]
    assert model.generate(prompt, **same).token_ids == model.generate(prompt, **options).token_ids
    with pytest.raises(OptionError, match="threshold and confidence_threshold are the same option"):
        model.generate(prompt, confidence_threshold=0.2, threshold=0.3)
    sdar = losart.load(write_checkpoint(tmp_path / "sdar", **SMALL), "cpu")
    with pytest.raises(OptionError, match="unknown option 'small_block_size'"):
        sdar.generate(prompt, small_block_size=4)
