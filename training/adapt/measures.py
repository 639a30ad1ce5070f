"""How good an adapted model is: cross-entropy of masked tokens, and its answers beside the base's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from losart.eval.repetition import distinct, repeated_within

from .block_decoding import Decoding, decode
from .chat_format import ChatFormat
from .decoder import Shape, Weights
from .next_tokens import answer, nll
from .objective import weighted_mean
from .step_texts import DIALOGUES, Stage, draw_texts
from .stream import make_stream
from .texts import Texts
from .trainer import Trainer


def masked_cross_entropy(
    trainer: Trainer, weights: Weights, texts: Texts, block: int, counts: Sequence[int], streams: int = 4
) -> dict[int, float]:
    """Of held-out texts, with so many of each block's tokens to be predicted."""
    plan, found = trainer.plan, {}
    # With gradients, as the compiled layers have them in training: else they are compiled once more.
    weights = {
        kind: value.detach().clone().requires_grad_(kind not in ("embed", "head"))
        for kind, value in weights.items()
    }
    for count in counts:
        total = 0.0
        noise = dataclasses.replace(plan.noise, exactly=count, decay=1.0)
        for number in range(streams):
            rng = np.random.default_rng((17, count, number))
            drawn = draw_texts(
                rng, {DIALOGUES: texts}, Stage(1.0, {DIALOGUES: 1.0}), plan.sizes.clean, noise.end_id
            )
            stream = make_stream(rng, drawn, [block] * len(drawn), plan.sizes, noise).to(trainer.device)
            total += float(weighted_mean(trainer.losses_of(stream, weights)[0].detach(), stream.weights))
        found[count] = total / streams
    return found


def held_out_prompts(texts: Texts, chat: ChatFormat, count: int, longest: int = 220) -> list[list[int]]:
    """Prompts up to the first answer of some texts."""
    prompts = []
    for number in range(len(texts)):
        ids, answers = texts[number]
        begin = int(np.argmax(answers))
        if len(chat.before) < begin <= longest:
            prompts.append(ids[:begin].tolist())
        if len(prompts) == count:
            break
    return prompts


def text_figures(
    shape: Shape, base: Weights, prompts: Sequence[Sequence[int]], answers: Sequence[list[int]], end_id: int
) -> dict[str, float]:
    """Of answers: the base's perplexity, distinct 2-grams, repeated 4-grams, tokens, and how many ended."""
    total, count = nll(shape, base, prompts, answers, end_id)
    return {
        "perplexity": math.exp(total / max(count, 1)),
        "distinct_2": distinct(answers),
        "repeated_4": repeated_within(answers),
        "tokens": count / len(answers),
        "ended": sum(given[-1:] == [end_id] for given in answers) / len(answers),
    }


def answer_figures(
    shape: Shape,
    base: Weights,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    count: int,
    how: Decoding,
    blocks: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """The base's greedy answers, then the model's with each block length, with the first texts of each."""
    given = answer(shape, base, prompts, count, how.end_id)
    figures: dict[str, Any] = {"of": "base, greedy", **text_figures(shape, base, prompts, given, how.end_id)}
    yield figures | {"answers": given[:6]}
    for block in blocks:
        made = decode(shape, weights, prompts, count, dataclasses.replace(how, block=block))
        figures = {"of": f"block {block}, threshold {how.threshold}"}
        figures |= text_figures(shape, base, prompts, made.answers, how.end_id)
        figures["tokens_a_pass"] = made.tokens / max(made.passes, 1)
        figures["tokens_a_pass_with_commits"] = made.tokens / max(made.passes + made.commits, 1)
        yield figures | {"answers": made.answers[:6]}
