"""How a family decodes blocks, where that is not an option of a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """A family's way from block to block, and its published defaults.

    Attributes
    ----------
    causal : bool
        Whether the prompt and finished blocks see only what is before them, token by token. Blocks then begin
        where the prompt ends; else at multiples of the block length, each seeing all of itself.
    shifted : bool
        Whether a token is predicted by the row before its own.
    seeds : bool
        Whether the last row of the prompt, and of each finished block, gives the first token of the block
        that follows. With `shifted` not of a prompt that ends within a block.
    spreads_masked : bool
        Whether the steps of a block that begins with the prompt's end share its masked positions, and not as
        many as a block has.
    ends_short : bool
        Whether the last block ends where the answer may end at most, and is not filled up with masks.
    defaults : tuple of (str, Any)
        Of `GenerationConfig`, where the family's differ from losart's.
    names : tuple of (str, str)
        The family's own names of options, and losart's.
    """

    causal: bool = False
    shifted: bool = False
    seeds: bool = False
    spreads_masked: bool = False
    ends_short: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()
    names: tuple[tuple[str, str], ...] = ()
