"""The log-probabilities of new tokens are those of the pass that fixed them, and ask for no other passes."""

import json

import numpy as np
import pytest
from dense_model import DenseModel, log_softmax
from families import FAMILIES, SMALL
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kept_logits import kept_logits

import losart
from losart.cli import main
from losart.engine.logprobs import token_logprob
from losart.errors import OptionError
from losart.eval.questions import make_questions
from losart.eval.tasks import TASKS
from losart.measure.random_checkpoint import write_checkpoint

LENGTHS = (1, 5, 8, 16, 30)
ALL = {"sdar": ("sdar", {"block_length": 4, "confidence_threshold": 0.4}), **FAMILIES}


@pytest.fixture(scope="module", params=ALL)
def family(request, tmp_path_factory):
    name, options = ALL[request.param]
    path = write_checkpoint(tmp_path_factory.mktemp(name), family=name, **SMALL)
    return losart.load(path, "cpu", deterministic=True), options | {
        "max_new_tokens": 21,
        "stop_token_ids": [],
    }


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(6, 250, length).tolist() for length in LENGTHS]


def expected_rows(model, seen, steps):
    """What passes say of each position: log-probabilities and the pass's number, of the last that set it."""
    found, number, left = {}, 0, [step for step in steps if step.kind != "commit"]
    for start, ids, proposed, kind, logits in seen:
        rows = log_softmax(logits, model.config.mask_token_id)
        if kind.value == "commit" and len(proposed) == 1 and model.config.decoding.seeds:
            found[start + len(ids)] = rows[0], number
            continue
        if kind.value == "commit" and not (left and left[0].kind == "later"):  # it changed nothing
            continue
        number += 1
        step = left.pop(0)
        of_row = dict(zip([row + model.config.decoding.shifted for row in proposed], rows, strict=True))
        for row in [*step.fixed, *step.edited]:
            found[step.block_start + row] = of_row[row], number
    assert not left
    return found


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 2}], ids=str)
def test_they_are_the_logits_of_the_pass_that_fixed_the_token(family, sampling):
    model, options = family
    for prompt in prompts():
        observed = []
        with kept_logits(model._engine.runner) as seen:
            stream = model.stream(prompt, observer=observed.append, logprobs=3, **options, **sampling)
            told = list(stream)
        expected = expected_rows(model, seen, observed)
        result = told[-1].result
        assert [one.token for one in result.logprobs] == result.token_ids
        for position, one in enumerate(result.logprobs, len(prompt)):
            row, number = expected[position]
            assert one.pass_number == number
            assert one.logprob == pytest.approx(row[one.token], abs=1e-6)
            best = np.argsort(-row, kind="stable")[:3]
            assert [token for token, _ in one.top] == best.tolist()
            np.testing.assert_allclose([logprob for _, logprob in one.top], row[best], atol=1e-6)
        assert [one for step in told for one in step.logprobs] == result.logprobs


def test_tokens_are_those_without_them(family):
    """Alone and among others that do not ask; and those that do not ask have none."""
    model, options = family
    alone = [model.generate(prompt, **options) for prompt in prompts()]
    assert all(result.logprobs is None for result in alone)
    engine = losart.Engine(model)
    streams = [
        engine.submit(prompt, **options | ({"logprobs": index} if index % 2 else {}))
        for index, prompt in enumerate(prompts())
    ]
    for index, (stream, expected) in enumerate(zip(streams, alone, strict=True)):
        steps = list(stream)
        assert steps[-1].result.token_ids == expected.token_ids
        assert steps[-1].result.stats.denoising_passes == expected.stats.denoising_passes
        if index % 2 == 0:
            assert all(step.logprobs is None for step in (*steps, steps[-1].result))
        else:
            assert all(len(one.top) == index for one in steps[-1].result.logprobs)


def test_they_are_those_of_a_dense_model(tmp_path):
    """Whose every pass computes all tokens anew, in float64."""
    path = write_checkpoint(tmp_path, **SMALL)
    model, dense = losart.load(path, "cpu"), DenseModel(path)
    mask, options = model.config.mask_token_id, {"block_length": 4, "confidence_threshold": 0.1}
    for prompt in prompts():
        steps = list(model.stream(prompt, max_new_tokens=11, stop_token_ids=[], logprobs=2, **options))
        result = steps[-1].result
        for number, step in enumerate(steps, start=1):
            block = [mask if token is None else token for token in step.block]
            for row in step.fixed:
                block[row] = mask
            before = (prompt + result.token_ids)[: step.block_start]
            rows = log_softmax(dense.logits(before, block, 4), mask)
            for row in step.fixed:
                place = step.block_start + row - len(prompt)
                if place < len(result.token_ids):
                    one = result.logprobs[place]
                    assert one.pass_number == number
                    assert one.logprob == pytest.approx(rows[row][one.token], abs=1e-4)
                    assert one.top[1][1] == pytest.approx(np.sort(rows[row])[-2], abs=1e-4)


@pytest.mark.parametrize("method", ["losa", "quest", "sparsed"])
def test_methods_of_attention_give_the_same_tokens_with_them(tiny_checkpoint, method):
    model = losart.load(tiny_checkpoint, "cpu")
    prompt = np.random.default_rng(0).integers(0, 300, 200).tolist()
    options = {"attention": method, "budget": 32, "max_new_tokens": 16, "stop_token_ids": []}
    expected = model.generate(prompt, **options)
    result = model.generate(prompt, logprobs=0, **options)
    assert result.token_ids == expected.token_ids
    assert all(one.top == () and one.logprob <= 0 for one in result.logprobs)


def test_the_shipped_model_is_sure_of_what_it_was_asked():
    model = losart.load(device="cpu")
    prompts = [one.prompt for one in make_questions(model, TASKS["key"], 256, 3, 0, "symbols")]
    for result in model.generate(prompts, logprobs=2, attention="losa"):
        for one in result.logprobs:
            assert one.top[0] == (one.token, one.logprob) and one.logprob > -0.01 and one.top[1][1] < -5


def test_a_stop_ends_them_where_the_tokens_end(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, "cpu")
    options = {"max_new_tokens": 20, "stop_token_ids": [], "logprobs": 1}
    whole = model.generate("a b c", **options)
    text = model.tokenizer.decode(whole.token_ids[:6])
    for stop in ({"stop_token_ids": [whole.token_ids[5]]}, {"stop": text[-3:]}):
        result = model.generate("a b c", **options | stop)
        assert result.finish_reason == "stop" and len(result.token_ids) < 20
        assert result.logprobs == whole.logprobs[: len(result.token_ids)]


def test_sessions_and_chats_take_the_option(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, "cpu")
    session = model.session(logprobs=2, max_new_tokens=6)
    assert len(session.generate("a b").logprobs[0].top) == 2
    assert len(session.generate("a b c", logprobs=4).logprobs[0].top) == 4


@pytest.mark.parametrize("value", [-1, 21, 1.5, True, "5"])
def test_values_that_are_none(tiny_checkpoint, value):
    model = losart.load(tiny_checkpoint, "cpu")
    with pytest.raises(OptionError, match=f"logprobs must be an integer from 0 to 20, not {value!r}"):
        model.generate([1, 2], logprobs=value)


@given(
    arrays(np.float32, 9, elements=st.sampled_from(np.float32([-np.inf, -60, -1, 0, 0.5, 7, 90]))),
    st.integers(0, 8),
    st.integers(0, 20),
)
def test_the_most_probable_tokens_are_first(logits, token, count):
    logits[token] = 3.0
    one = token_logprob(logits, token, count, 7)
    with np.errstate(divide="ignore"):
        p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
        expected = np.log(p)
    ranked = sorted((float(-expected[i]), i) for i in range(9) if logits[i] > -np.inf)[:count]
    assert (one.token, one.pass_number) == (token, 7)
    assert one.logprob == pytest.approx(expected[token], abs=1e-9)
    assert [found for found, _ in one.top] == [i for _, i in ranked]
    assert [-logprob for _, logprob in one.top] == pytest.approx([value for value, _ in ranked], abs=1e-9)


def test_commands(tiny_checkpoint, tmp_path, capsys):
    asked = ["--device", "cpu", "--max-new-tokens", "5", "--logprobs", "2"]
    assert main(["generate", str(tiny_checkpoint), "--prompt", "a b", "--json", *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = losart.generate(tiny_checkpoint, "a b", device="cpu", max_new_tokens=5, logprobs=2)
    assert [one["token"] for one in found["logprobs"]] == found["token_ids"] == expected.token_ids
    for one, other in zip(found["logprobs"], expected.logprobs, strict=True):
        assert one == {
            "token": other.token,
            "logprob": other.logprob,
            "top": [list(pair) for pair in other.top],
            "pass_number": other.pass_number,
        }
    lines, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text('{"prompt": "a b"}\n{"prompt": "a b", "logprobs": 0}\n')
    assert main(["batch", str(lines), str(answers), "--model", str(tiny_checkpoint), *asked]) == 0
    first, second = map(json.loads, answers.read_text().splitlines())
    for one, other in zip(first["logprobs"], found["logprobs"], strict=True):  # rounded otherwise
        assert (one["token"], one["pass_number"]) == (other["token"], other["pass_number"])
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
    assert [one["top"] for one in second["logprobs"]] == [[]] * len(second["token_ids"])
    assert main(["generate", str(tiny_checkpoint), "--prompt", "a b", *asked]) != 0
    assert "--logprobs goes with --json" in capsys.readouterr().err
