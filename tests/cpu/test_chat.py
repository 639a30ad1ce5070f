"""Conversations: who said what, what is prefilled anew, and what an interrupt or a mistake leaves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from test_model_api import with_tensor

import losart
from losart import OptionError, PromptError


def only_letters(head: np.ndarray) -> np.ndarray:
    """Logits of zero for all but printable ASCII: answers then are the text of their own tokens."""
    head[ord("~") - ord("!") + 1 :] = 0
    return head


@pytest.fixture
def make_talker(make_checkpoint):
    def make(dtype="float32", **options):
        path = make_checkpoint(num_layers=2, head_gain=1.0, **options)
        return losart.load(with_tensor(path, "lm_head.weight", only_letters), "cpu", dtype)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_length", [1, 4, 16])
@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("attention", [{}, {"attention": "losa", "budget": 16, "active": 2}])
def test_turns_are_those_of_the_whole_conversation(make_talker, dtype, block_length, page_size, attention):
    model = make_talker(dtype=dtype)
    options = {"max_new_tokens": 60, "block_length": block_length, "page_size": page_size, **attention}
    chat = losart.Chat(model, "Be brief.", **options)
    known: list[int] = []
    for text in ("Why is the sky blue?", "And at sunset?", "And at night?"):
        said = [*chat.messages, {"role": "user", "content": text}]
        whole = [{"role": "system", "content": "Be brief."}, *said]
        answer = chat.say(text)
        assert answer.token_ids == model.generate(whole, **options).token_ids
        assert chat.messages == [*said, {"role": "assistant", "content": answer.text}]
        # Of the turn before, whole pages are reused, without the block that its answer ended in.
        ids = model.tokenizer.encode(model.chat_template.render(whole), special=False)
        assert ids[: len(known)] == known
        reused = max(0, len(known) - 1) // block_length * block_length
        reused = reused // (step := math.lcm(block_length, page_size)) * step
        assert answer.stats.reused_tokens == reused
        assert answer.stats.prefilled_tokens == len(ids) // block_length * block_length - reused
        known = [*ids, *answer.token_ids]


def test_text_that_is_tokenized_otherwise_than_it_was_generated(tiny_checkpoint):
    """The random model's tokens are often pairs of bytes, or no text: only what agrees is reused."""
    model = losart.load(tiny_checkpoint, device="cpu")
    chat = losart.Chat(model, max_new_tokens=60)
    first = chat.say("Why is the sky blue?")
    again = model.tokenizer.encode(first.text)
    assert again != first.token_ids
    second = chat.say("And at sunset?")
    assert second.stats.reused_tokens >= first.stats.prompt_tokens // 16 * 16 - 16
    assert second.stats.reused_tokens < first.stats.prompt_tokens + len(first.token_ids)
    assert second.token_ids == model.generate(chat.messages[:-1], max_new_tokens=60).token_ids


def test_an_answer_that_is_left_stays_as_far_as_it_came(make_talker):
    model = make_talker()
    chat = losart.Chat(model, max_new_tokens=60)
    for step in chat.stream("Why?"):
        assert chat.messages == [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": step.text},
        ] or not (step.text or chat.messages)
        if len(step.text) > 20:
            break
    assert chat.messages[1]["content"] == step.text
    answer = chat.say("Go on.")
    assert answer.token_ids == model.generate(chat.messages[:-1], max_new_tokens=60).token_ids
    # All but the last finished block, which was not committed yet, in whole pages.
    known = [token for token in step.block if token is not None]
    assert answer.stats.reused_tokens == (step.block_start + len(known) - 4) // 16 * 16 > 16


def test_a_question_that_is_left_without_an_answer_is_not_kept(make_talker):
    model = make_talker()
    chat = losart.Chat(model, max_new_tokens=20)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("Why?" * 20, progress=interrupt)
    assert chat.messages == []
    messages = [{"role": "user", "content": "Who?"}]
    assert chat.say("Who?").token_ids == model.generate(messages, max_new_tokens=20).token_ids


def test_reset_and_system(make_talker):
    model = make_talker()
    chat = losart.Chat(model, max_new_tokens=20)
    first = chat.say("Why?").token_ids
    old = chat.messages
    chat.reset()
    assert (chat.messages, len(old)) == ([], 2)
    assert chat.say("Why?").token_ids == first
    chat.reset()
    chat.system = "Be brief."
    whole = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert chat.say("Why?").token_ids == model.generate(whole, max_new_tokens=20).token_ids
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_a_conversation_longer_than_the_positions(make_talker):
    model = make_talker(max_positions=128)
    chat = losart.Chat(model, max_new_tokens=30)
    chat.say("Why?")
    before = [dict(message) for message in chat.messages]
    with pytest.raises(PromptError, match="128 positions"):
        chat.stream("And then? " * 10)
    assert chat.messages == before
    answer = chat.say("So?")
    assert answer.stats.reused_tokens > 0
    assert answer.token_ids == model.generate(chat.messages[:-1], max_new_tokens=30).token_ids


def test_mistakes(make_talker, make_checkpoint):
    model = make_talker()
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        losart.Chat(model, temprature=1)
    chat = losart.Chat(model, max_new_tokens=4)
    with pytest.raises(PromptError, match="messages"):
        chat.stream(3)
    with pytest.raises(PromptError, match="a chat needs a tokenizer"):
        losart.Chat(losart.load(make_checkpoint("no-tokenizer", tokenizer=False), device="cpu"))
    path = make_checkpoint("no-template")
    keys = json.loads((path / "tokenizer_config.json").read_text())
    del keys["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(keys))
    with pytest.raises(PromptError, match="a chat needs a chat template"):
        losart.Chat(losart.load(path, device="cpu"))


def test_a_template_s_refusal_leaves_the_conversation(make_talker):
    model = make_talker()
    source = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}hello"
    object.__setattr__(model.chat_template, "source", source)
    chat = losart.Chat(model, max_new_tokens=4)
    chat.say("Why?")
    with pytest.raises(PromptError, match="too many"):
        chat.say("And?")
    assert len(chat.messages) == 2
