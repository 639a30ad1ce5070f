"""How probable a model finds continuations: the chain rule over a block's tokens, one per pass."""

import itertools

import numpy as np
import pytest
from dense_model import DenseModel, log_softmax
from families import FAMILIES, SMALL

import losart
from losart.errors import OptionError, PromptError
from losart.eval.questions import make_questions
from losart.eval.tasks import TASKS
from losart.measure.random_checkpoint import write_checkpoint

ALL = {"sdar": ("sdar", {"block_length": 4}), **FAMILIES}
SIZES = ("block_length", "block_size", "small_block_size")
PROMPT = np.random.default_rng(5).integers(6, 250, 37).tolist()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model, and what computes its logits anew in float64."""
    path = write_checkpoint(tmp_path_factory.mktemp("sdar"), **SMALL)
    return losart.load(path, "cpu"), DenseModel(path)


@pytest.fixture(scope="module", params=ALL)
def family(request, tmp_path_factory):
    name, options = ALL[request.param]
    path = write_checkpoint(tmp_path_factory.mktemp(name), family=name, **SMALL)
    return losart.load(path, "cpu"), {name: options[name] for name in SIZES if name in options}


def chain(dense, mask, prompt, tokens, length, order):
    """Of each token, given the prompt, the blocks before its own, and those of its block that come before."""
    whole, found = [*prompt, *tokens], []
    for place in range(len(tokens)):
        at = len(prompt) + place
        start = at // length * length
        block = [mask] * length
        for other in range(start, min(start + length, len(whole))):
            if other < len(prompt) or order[other - len(prompt)] < order[place]:
                block[other - start] = whole[other]
        logits = dense.logits(whole[:start], block, length)[at - start]
        found.append(log_softmax(logits, mask)[tokens[place]])
    return found


@pytest.mark.parametrize("prompt", [1, 3, 8, 37])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_it_is_the_chain_rule(pair, prompt, count):
    model, dense = pair
    mask, tokens = model.config.mask_token_id, np.random.default_rng(count).integers(6, 250, count).tolist()
    found = model.score(PROMPT[:prompt], tokens, block_length=4)
    expected = chain(dense, mask, PROMPT[:prompt], tokens, 4, range(count))
    np.testing.assert_allclose(found.token_logprobs, expected, atol=1e-4)
    assert found.logprob == pytest.approx(sum(expected), abs=1e-3) and found.token_ids == tokens
    assert not found.greedy
    orders = [np.random.default_rng([3, n]).random(count) for n in range(4)]
    sampled = model.score(PROMPT[:prompt], tokens, block_length=4, samples=4, seed=3)
    each = [chain(dense, mask, PROMPT[:prompt], tokens, 4, order) for order in orders]
    np.testing.assert_allclose(sampled.token_logprobs, np.mean(each, axis=0), atol=1e-4)


def test_the_mean_over_orders_is_the_bound_of_masked_tokens(pair):
    """LLaDA's (arXiv 2502.09992): l of L tokens are masked, l uniform, and weigh L / l."""
    model, dense = pair
    mask, prompt, tokens = model.config.mask_token_id, PROMPT[:8], [40, 50, 60, 70]
    bound = 0.0
    for count in range(1, 5):
        subsets = list(itertools.combinations(range(4), count))
        for masked in subsets:
            block = [mask if row in masked else token for row, token in enumerate(tokens)]
            rows = log_softmax(dense.logits(prompt, block, 4), mask)
            weight = 4 / count / (4 * len(subsets))
            bound += weight * sum(rows[row][tokens[row]] for row in masked)
    orders = list(itertools.permutations(range(4)))
    exact = np.mean([sum(chain(dense, mask, prompt, tokens, 4, order)) for order in orders])
    assert exact == pytest.approx(bound, abs=1e-9)
    spread = np.std([sum(chain(dense, mask, prompt, tokens, 4, order)) for order in orders])
    found = model.score(prompt, tokens, block_length=4, samples=200).logprob
    assert abs(found - bound) < 4 * spread / np.sqrt(200)


def test_what_is_decoded_from_left_to_right_is_as_probable_as_it_was(family):
    model, sizes = family
    options = sizes | {"remasking": "sequential", "stop_token_ids": [], "max_new_tokens": 30}
    options |= {"denoising_steps": 64, "editing_threshold": 1.0, "logprobs": 1}
    prompts = [PROMPT[:length] for length in (1, 5, 8, 37)]
    generated = [model.generate(prompt, **options) for prompt in prompts]
    scores = model.score(prompts, [one.token_ids[:19] for one in generated], **sizes)
    for one, found in zip(generated, scores, strict=True):
        assert found.greedy and found.token_ids == one.token_ids[:19]
        expected = [of_token.logprob for of_token in one.logprobs[:19]]
        np.testing.assert_allclose(found.token_logprobs, expected, atol=1e-4)
    other = [*generated[1].token_ids[:7], generated[1].logprobs[7].top[0][0] ^ 1]
    found = model.score(prompts[1], other, **sizes)
    assert not found.greedy
    np.testing.assert_allclose(found.token_logprobs[:7], scores[1].token_logprobs[:7], atol=1e-4)


def test_probabilities_of_a_token_add_up_to_one(family):
    model, sizes = family
    mask = model.config.mask_token_id
    tokens = [[token] for token in range(model.config.vocab_size) if token != mask]
    scores = model.score([PROMPT[:6]] * len(tokens), tokens, **sizes)
    assert sum(np.exp(one.logprob) for one in scores) == pytest.approx(1, abs=1e-4)
    assert sum(one.greedy for one in scores) == 1
    assert model.score(PROMPT[:6], [mask], **sizes).logprob == -np.inf


def test_parts_of_a_block_change_nothing_from_left_to_right(family):
    model, sizes = family
    sizes = {name: size for name, size in sizes.items() if name != "small_block_size"}
    whole, parts = (
        model.score(PROMPT[:9], PROMPT[20:31], **sizes, sub_block_length=length) for length in (8, 2)
    )
    assert parts.token_logprobs == pytest.approx(whole.token_logprobs, abs=1e-4)


def test_orders_are_the_seed_s_and_families_have_them(family):
    model, sizes = family
    tokens = PROMPT[10:31]
    first, again, other, plain = (
        model.score(PROMPT[:9], tokens, **sizes, **how)
        for how in ({"samples": 3}, {"samples": 3}, {"samples": 3, "seed": 1}, {})
    )
    assert first.token_logprobs == pytest.approx(again.token_logprobs, abs=1e-4)
    assert first.logprob != pytest.approx(other.logprob, abs=1e-4)
    assert first.logprob != pytest.approx(plain.logprob, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"samples": 2}, {"attention": "losa", "budget": 64}], ids=str)
def test_the_shipped_model_knows_which_answer_is_right(options):
    model = losart.load(device="cpu")
    questions = list(make_questions(model, TASKS["key"], 256, 3, 0, "symbols"))
    answers = [one.token_ids for one in model.generate([one.prompt for one in questions])]
    for right, question in enumerate(questions):
        scores = model.score([question.prompt] * 3, answers, **options)
        assert scores[right].logprob > -0.01 and scores[right].greedy
        assert all(one.logprob < -10 for index, one in enumerate(scores) if index != right)


def test_texts_are_tokenized_together(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, "cpu")
    encode = model.tokenizer.encode
    found = model.score("a b", " c d")
    assert found.token_ids == encode("a b c d")[len(encode("a b")) :]
    assert found.logprob == pytest.approx(model.score(encode("a b"), found.token_ids).logprob, abs=1e-4)
    with pytest.raises(PromptError, match="the continuation is empty"):
        model.score("a b", "")


def test_what_is_wrong_is_named(pair):
    model, _ = pair
    for options, text in (
        ({"samples": 0}, "samples must be an integer, 1 or more, not 0"),
        ({"seed": -1}, "seed must be an integer, 0 or more, not -1"),
        ({"temperature": 1.0}, "score has no option 'temperature'"),
        ({"block_length": 0}, "block_length must be an integer, 1 or more, not 0"),
    ):
        with pytest.raises(OptionError, match=text):
            model.score([1], [2], **options)
    last = model.config.max_positions - 1
    assert model.score([7] * last, [2], block_length=1).logprob < 0
    for prompt, tokens, text in (
        ([1], [], "the continuation is empty"),
        ([1], [320], "token id 320 of the continuation is outside the vocabulary"),
        ([], [1], "the prompt is empty"),
        ([7] * last, [2, 3], "do not fit into the model's"),
        ([[1], [2]], [[3]], "a list of prompts needs a list of as many continuations"),
        ([[1], []], [[3], [4]], "prompt 1: the prompt is empty"),
        ("a", [1], "no tokenizer.json"),
    ):
        with pytest.raises(PromptError, match=text):
            model.score(prompt, tokens)
