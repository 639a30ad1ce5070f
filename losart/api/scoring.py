"""How probable a model finds given continuations of prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from losart.config.checks import is_int
from losart.config.model import ModelConfig
from losart.config.options import ATTENTION_OPTIONS, GenerationConfig, generation_config
from losart.engine.engine import HELD_PREFIXES, Engine
from losart.engine.kv_pool import KVPool
from losart.engine.runner import Runner
from losart.engine.scoring import GivenTokens
from losart.engine.stream import Stream
from losart.errors import OptionError, PromptError
from losart.loaders.chat_template import ChatTemplate
from losart.loaders.tokenizer import Prompt, Tokenizer, is_batch, prompt_ids

Continuation = str | Sequence[int]
AHEAD = 4  # times as many generations are begun as can share passes
SCORE_OPTIONS = {"attention", "block_length", "sub_block_length", "mask_token_id"} | ATTENTION_OPTIONS


@dataclass(frozen=True)
class Score:
    """How probable a continuation is.

    Attributes
    ----------
    logprob : float
        Natural logarithm of its probability, or with `samples` of a lower bound's estimate: the sum of
        `token_logprobs`.
    token_ids : list of int
        The continuation's.
    token_logprobs : list of float
        Of each token in the pass that fixed it; with `samples` the mean over them.
    greedy : bool
        Whether each token was the most probable one in its pass: without `samples`, whether greedy decoding
        from left to right, a token per pass, gives the continuation.
    """

    logprob: float
    token_ids: list[int]
    token_logprobs: list[float]
    greedy: bool


def score(
    runner: Runner,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    prompt: Any,
    continuation: Any,
    samples: int | None,
    seed: int,
    options: dict[str, Any],
) -> Score | list[Score]:
    """As :meth:`losart.Model.score`."""
    for name, value, least in (("samples", 1 if samples is None else samples, 1), ("seed", seed, 0)):
        if not (is_int(value) and value >= least):
            raise OptionError(f"{name} must be an integer, {least} or more, not {value!r}")
    own_names = dict(runner.config.decoding.names)
    for name in options:
        if own_names.get(name, name) not in SCORE_OPTIONS:
            raise OptionError(f"score has no option {name!r}; there are {', '.join(sorted(SCORE_OPTIONS))}")
    several = is_batch(prompt)
    if several and not (isinstance(continuation, (list, tuple)) and len(continuation) == len(prompt)):
        raise PromptError("a list of prompts needs a list of as many continuations")
    engine = Engine(runner, runner.max_sequences, KVPool(HELD_PREFIXES), prefill_first=True)
    asked = []
    for index, pair in enumerate(
        zip(prompt, continuation, strict=True) if several else [(prompt, continuation)]
    ):
        try:
            ids, tokens = pair_ids(runner.config, tokenizer, template, *pair)
            asked.append((ids, tokens, _options(engine, ids, tokens, options)))
        except PromptError as error:
            if not several:
                raise
            raise PromptError(f"prompt {index}: {error}") from error
    scores = list(_scores(engine, asked, samples, seed))
    return scores if several else scores[0]


def pair_ids(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    prompt: Prompt,
    continuation: Continuation,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what continues it.

    Two texts are tokenized together, unless that changes the prompt's tokens.

    Raises
    ------
    PromptError
        As of `prompt_ids`, of either.
    """
    ids = prompt_ids(prompt, config, tokenizer, template)
    if isinstance(continuation, str):
        if tokenizer is None:
            raise PromptError("the checkpoint has no tokenizer.json for a string; give token ids")
        tokens = tokenizer.encode(prompt + continuation) if isinstance(prompt, str) else []
        together = tokens[: len(ids)] == ids
        tokens = tokens[len(ids) :] if together else tokenizer.encode(continuation, special=False)
    else:
        tokens = [int(token) for token in continuation]
    if not tokens:
        raise PromptError("the continuation is empty")
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise PromptError(f"token id {token} of the continuation is outside the vocabulary")
    return ids, tokens


def _options(engine: Engine, ids: list[int], tokens: list[int], options: dict[str, Any]) -> GenerationConfig:
    """Of a generation of the continuation."""
    config = engine.runner.config
    fixed = {"max_new_tokens": len(tokens), "stop_token_ids": [], "editing_threshold": 1.0}
    how = generation_config(config, {**options, **fixed})
    engine.check(how, None)
    room = engine.room(ids, how)
    if room < len(tokens):
        raise PromptError(
            f"the prompt has {len(ids)} tokens and the continuation {len(tokens)}: they do not fit into the "
            f"model's {config.max_positions} positions in blocks of {how.block_length}"
        )
    if config.decoding.ends_short:  # else the last block would tell where the continuation ends
        whole = -(-(len(ids) + len(tokens)) // how.block_length) * how.block_length - len(ids)
        how = replace(how, max_new_tokens=min(whole, room))
    return how


def _scores(
    engine: Engine,
    asked: list[tuple[list[int], list[int], GenerationConfig]],
    samples: int | None,
    seed: int,
) -> Iterator[Score]:
    """In order; generations are begun as far ahead as the engine needs."""
    under_way: deque[list[tuple[GivenTokens, Stream]]] = deque()

    def first() -> Score:
        runs = under_way.popleft()
        for _, stream in runs:
            stream.result()
        of_token = np.mean([given.logprobs for given, _ in runs], axis=0)
        greedy = all(given.greedy for given, _ in runs)
        return Score(float(of_token.sum()), runs[0][0].tokens, of_token.tolist(), greedy)

    for ids, tokens, options in asked:
        runs = []
        for sample in [None] if samples is None else range(samples):
            order = None if sample is None else np.random.default_rng([seed, sample]).random(len(tokens))
            given = GivenTokens(tokens, len(ids), order)
            runs.append((given, engine.submit(ids, options, each_step=False, hooks=[given])))
            runs[-1][1].start()
        under_way.append(runs)
        if sum(map(len, under_way)) > AHEAD * engine.max_sequences:
            yield first()
    while under_way:
        yield first()
