"""losart as a model of EleutherAI's lm_eval: `python -m losart.eval.harness --model losart --tasks ...`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from losart.api.engine import Engine
from losart.api.model import load
from losart.api.requests import answers
from losart.api.scoring import SCORE_OPTIONS
from losart.config.options import OPTIONS, generation_config
from losart.errors import LosartError, OptionError, PromptError

LOADING = ("dtype", "weights", "kv", "adapter", "merge", "deterministic")
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # as tasks call it


@register_model("losart")
class LosartLM(LM):
    """Answers lm_eval's requests.

    Parameters
    ----------
    pretrained : str, optional
        As `model` of :func:`losart.load`.
    device : str
        "auto", "cpu" or "cuda".
    samples : int, optional
        As of :meth:`losart.Model.score`.
    seed : int
        Of drawn tokens, and of `samples`.
    max_sequences : int, optional
        As of :class:`losart.Engine`, for `generate_until`.
    max_gen_toks : int
        New tokens at most, where a task does not say.
    batch_size, max_batch_size
        lm_eval's, not used: what shares a pass is the engine's.
    **options
        Of :func:`losart.load` and :meth:`losart.Model.generate`.

    Raises
    ------
    OptionError
        An option is unknown or out of range.
    PromptError
        The checkpoint has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        device: str = "auto",
        samples: int | None = None,
        seed: int = 0,
        max_sequences: int | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        loading = {name: options.pop(name) for name in LOADING if name in options}
        self.model = load(pretrained, device, **loading)
        if self.model.tokenizer is None:
            raise PromptError("lm_eval gives text, and the checkpoint has no tokenizer")
        config, self._tokenizer = self.model.config, self.model.tokenizer
        self._block_length = generation_config(config, options).block_length
        names = dict(config.decoding.names)
        self._options = options
        self._known = {*OPTIONS, *names}
        self._scoring = {name: options[name] for name in options if names.get(name, name) in SCORE_OPTIONS}
        self._scoring |= {"samples": samples, "seed": seed}
        self._seed = seed
        self._max_gen_toks = max_gen_toks
        self._engine = Engine(self.model, max_sequences=max_sequences, prefill_first=True)
        self._name = str(pretrained or "small_checkpoint")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LosartLM:
        """From `--model_args`, which go before `--device`; lm_eval's "cuda:0" is losart's "cuda"."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(given.get("device")).startswith("cuda"):
            given["device"] = "cuda"
        return cls(**(given | arg_dict))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> LosartLM:
        """As `create_from_arg_obj`, of "name=value,..."."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each request's continuation, and whether greedy decoding gives it."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            text = context.rstrip()
            continuation = context[len(text) :] + continuation  # a space belongs to the word after it
            if text:
                ids = self._encode(text)
                tokens = self._encode(text + continuation)[len(ids) :]
            else:
                ids, tokens = [self._prefix], self._tokenizer.encode(continuation, special=False)
            pairs.append((ids, tokens))
        found = self._scores(pairs)
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each request's text, in windows of the model's positions."""
        room = self.model.config.max_positions - self._block_length
        pairs, counts = list[tuple[list[int], list[int]]](), []
        for request in requests:
            ids = self._tokenizer.encode(request.args[0], special=False)
            windows = get_rolling_token_windows(ids, self._prefix, room, 1)
            before = len(pairs)
            pairs += [make_disjoint_window(window) for window in windows]
            counts.append(len(pairs) - before)
        scores = iter(self._scores(pairs))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that each request's context is answered with, up to one of its stops."""
        texts = []
        asked = ((request, *self._generation(*request.args)) for request in requests)
        for request, answer in answers(self._engine, asked):
            if isinstance(answer, LosartError):
                raise answer
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
            texts.append(answer.text)
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation."""
        if self.model.chat_template is None:
            raise PromptError("the checkpoint has no chat template")
        return self.model.chat_template.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """lm_eval notes it; here the checkpoint's is the only one."""
        return "" if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """By which lm_eval tells caches of requests apart."""
        return self._name.replace("/", "__")

    @property
    def _prefix(self) -> int:
        """The token before a text that nothing comes before."""
        ends = self.model.config.end_token_ids
        found = self._tokenizer.eos_token_id if not ends else ends[0]
        if found is None:
            raise OptionError("the checkpoint has no end token for lm_eval to put before a text")
        return found

    def _encode(self, text: str) -> list[int]:
        """Token ids; a template may have spelled out the special tokens that begin every text."""
        ids, plain = self._tokenizer.encode(text), self._tokenizer.encode(text, special=False)
        return plain if len(ids) > len(plain) and ids[:1] == plain[:1] else ids

    def _fitting(self, ids: list[int], tokens: int) -> list[int]:
        """The end of a context that is too long to be followed by so many tokens, in whole blocks."""
        room = self.model.config.max_positions - -(-tokens // self._block_length) * self._block_length
        return ids[-max(1, room) :]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        prompts = [self._fitting(ids, len(tokens)) for ids, tokens in pairs]
        scores = self.model.score(prompts, [tokens for _, tokens in pairs], **self._scoring)
        assert isinstance(scores, list)
        return [(one.logprob, one.greedy) for one in scores]

    def _generation(self, context: str, how: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """A request's prompt, and its options by losart's names."""
        how = dict(how)
        until = how.pop("until", None) or []
        lengths = [value for name in NEW_TOKENS if (value := how.pop(name, None)) is not None]
        temperature = how.pop("temperature", None)
        samples = how.pop("do_sample", bool(temperature))
        if unknown := how.keys() - self._known:
            warnings.warn(f"losart has no {', '.join(sorted(unknown))}, which a task asks for", stacklevel=2)
        options = self._options | {name: value for name, value in how.items() if name in self._known}
        options["max_new_tokens"] = lengths[0] if lengths else self._max_gen_toks
        options["stop"] = [until] if isinstance(until, str) else [text for text in until if text]
        options["temperature"] = (1.0 if temperature is None else temperature) if samples else 0.0
        options.setdefault("seed", self._seed)
        return self._fitting(self._encode(context), options["max_new_tokens"]), options


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
