"""Compile a grammar from standard input, and nothing else: a script, run in a process that can be ended.

Where regular expressions are intersected llguidance heeds no limit, and cannot be interrupted.
"""

import resource
import sys

from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper


class Bytes:
    """A tokenizer whose tokens are bytes: which ones does not matter to what takes long."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]  # noqa: RUF012
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    """Compile it; what is wrong with it is said elsewhere."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.read(), log_level=0).compute_bitmask()


if __name__ == "__main__":
    main()
