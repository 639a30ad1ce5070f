"""How probable a model finds given continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from losart.config.checks import is_int
from losart.config.model import ModelConfig
from losart.config.options import ATTENTION_OPTIONS, generation_config
from losart.engine.engine import HELD_PREFIXES, Engine
from losart.engine.kv_pool import KVPool
from losart.engine.runner import Runner
from losart.engine.scoring import GivenTokens
from losart.errors import OptionError, PromptError
from losart.loaders.chat_template import ChatTemplate
from losart.loaders.tokenizer import Prompt, Tokenizer, is_batch, prompt_ids

Continuation = str | Sequence[int]
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
    begun = []
    for index, pair in enumerate(
        zip(prompt, continuation, strict=True) if several else [(prompt, continuation)]
    ):
        try:
            ids, tokens = pair_ids(runner.config, tokenizer, template, *pair)
            begun.append((tokens, _begun(engine, ids, tokens, samples, seed, options)))
        except PromptError as error:
            if not several:
                raise
            raise PromptError(f"prompt {index}: {error}") from error
    for _, runs in begun:
        for _, stream in runs:
            stream.start()
    scores = []
    for tokens, runs in begun:
        for _, stream in runs:
            stream.result()
        of_token = np.mean([given.logprobs for given, _ in runs], axis=0)
        greedy = all(given.greedy for given, _ in runs)
        scores.append(Score(float(of_token.sum()), tokens, of_token.tolist(), greedy))
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


def _begun(
    engine: Engine,
    ids: list[int],
    tokens: list[int],
    samples: int | None,
    seed: int,
    options: dict[str, Any],
) -> list[tuple[GivenTokens, Any]]:
    """A generation of the continuation for each order in which its tokens are fixed, not yet started."""
    config = engine.runner.config
    fixed = {"max_new_tokens": len(tokens), "stop_token_ids": [], "editing_threshold": 1.0}
    how = generation_config(config, {**options, **fixed})
    room = engine.room(ids, how)
    if config.decoding.ends_short:  # else the last block would tell where the continuation ends
        whole = -(-(len(ids) + len(tokens)) // how.block_length) * how.block_length - len(ids)
        how = replace(how, max_new_tokens=min(whole, room))
    if room < len(tokens):
        raise PromptError(
            f"the prompt has {len(ids)} tokens and the continuation {len(tokens)}: they do not fit into the "
            f"model's {config.max_positions} positions in blocks of {how.block_length}"
        )
    orders: list[np.ndarray | None] = [None]
    if samples is not None:
        orders = [np.random.default_rng([seed, n]).random(len(tokens)) for n in range(samples)]
    runs = []
    for order in orders:
        given = GivenTokens(tokens, len(ids), order)
        runs.append((given, engine.submit(ids, how, each_step=False, hooks=[given])))
    return runs
