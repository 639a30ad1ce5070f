"""From options to matchers of a model's tokens."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from losart.config.model import ModelConfig
from losart.errors import OptionError
from losart.structured.matcher import Matcher, shortened

TRIAL = Path(__file__).with_name("trial.py")
HELD = 16  # grammars that were used last, compiled
TRIAL_SECONDS = 5
TRIAL_MEMORY = 2 << 30
# Between tokens of JSON: llguidance allows any, and a model can go on with that for ever.
WHITESPACE = r" |\n[ \t]{0,32}"
NOTHING = "no text fits it"
# Of llguidance; less than its own, so that nobody's grammar holds up the passes of others for long.
LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# What may intersect regular expressions, which takes exponential time.
INTERSECTS = {
    "json_schema": re.compile(r'"(allOf|\$ref|\$dynamicRef|patternProperties|propertyNames)"'),
    "regex": re.compile("(?!)"),
    "grammar": re.compile("[&~%]"),
}


class Grammars:
    """Makes matchers for the generations of one model; for several threads.

    Parameters
    ----------
    config : ModelConfig
    tokenizer : callable or None
        Gives the JSON of Hugging Face's tokenizers; asked when the first grammar comes. None: there is none.
    """

    def __init__(self, config: ModelConfig, tokenizer: Callable[[], str] | None) -> None:
        self._config = config
        self._read_tokenizer = tokenizer
        self._tokenizer: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, option: str, text: str) -> Matcher:
        """A matcher at the beginning of a grammar.

        Parameters
        ----------
        option : {"json_schema", "regex", "grammar"}
        text : str

        Raises
        ------
        OptionError
            The grammar is wrong, not supported, or too large; the checkpoint has no tokenizer, none that can
            be used, or no end token; llguidance is not installed.
        """
        with self._lock:
            compiled = self._compiled.get((option, text))
        if compiled is None:  # outside of the lock: it may take seconds
            compiled = self._compile(option, text)
        with self._lock:
            self._compiled[option, text] = compiled
            self._compiled.move_to_end((option, text))
            if len(self._compiled) > HELD:
                self._compiled.popitem(last=False)
            own = compiled.deep_copy()
        return Matcher(option, own, self._config.vocab_size, self._config.end_token_ids)

    def _compile(self, option: str, text: str) -> Any:
        try:
            import llguidance
        except ImportError:
            raise OptionError(f"{option} needs llguidance: pip install 'losart[structured]'") from None
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._new_tokenizer(option)
        make: Any = llguidance.LLMatcher
        try:
            if option == "json_schema":
                grammar = make.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
            else:
                grammar = (make.grammar_from_regex if option == "regex" else make.grammar_from_lark)(text)
        except ValueError as error:  # half a surrogate pair, of which JSON may have one, too
            raise OptionError(f"{option}: {error}") from None
        if INTERSECTS[option].search(text):
            _try(option, grammar)
        matcher = make(self._tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # which finds more mistakes
        if matcher.is_error():
            message = shortened(matcher.get_error())
            raise OptionError(f"{option}: {NOTHING if message.startswith('NoExtension') else message}")
        return matcher

    def _new_tokenizer(self, option: str) -> Any:
        from llguidance import LLTokenizer

        if self._read_tokenizer is None:
            raise OptionError(f"{option}: the checkpoint has no tokenizer")
        ends = list(self._config.end_token_ids)
        if not ends:
            raise OptionError(f"{option}: the checkpoint does not say its end token")
        try:
            text = self._read_tokenizer()
            own = LLTokenizer(text, eos_token=ends)
            if own.vocab_size >= self._config.vocab_size:
                return own
            return LLTokenizer(text, n_vocab=self._config.vocab_size, eos_token=ends)
        except Exception as error:  # the library has no exception of its own
            message = f"{option}: the checkpoint's tokenizer cannot follow a grammar: {error}"
            raise OptionError(message) from error


def _try(option: str, grammar: str) -> None:
    """See, in another process, that a grammar can be compiled in seconds.

    Raises
    ------
    OptionError
        It cannot.
    """
    command = [sys.executable, str(TRIAL), str(TRIAL_SECONDS), str(TRIAL_MEMORY)]
    try:
        ended = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=2 * TRIAL_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        ended = -1
    except OSError as error:
        message = f"{option}: no other process can be started to try the grammar in: {error}"
        raise OptionError(message) from error
    if ended:
        raise OptionError(f"{option}: it cannot be compiled in {TRIAL_SECONDS} seconds")
