"""Which token of a training row sees which: one document, and many questions about it.

A row is the document, then the questions, each its own tokens and the block of its answer. Every
question stands where it would stand if it were the only one: right after the document. A token sees
those of its own block and of earlier blocks, of the document and of its own question; so one pass over
the document trains all of its questions. That is the training layout of block diffusion
(arXiv 2503.09573), whose noisy copy is needed here for the answers only.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout:
    """Rows of one shape.

    Parameters
    ----------
    document : int
        Tokens of the document.
    questions : int
    question : int
        Tokens of a question without its answer.
    block : int
        Tokens of a block; of an answer too. Both sizes above are multiples of it.
    device : torch.device

    Attributes
    ----------
    positions, part : int64 [tokens]
        Position in the sequence that the model is to believe in; 0 in the document, the number of its
        question, from 1 on, elsewhere.
    """

    def __init__(self, document: int, questions: int, question: int, block: int, device: Any) -> None:
        if document % block or question % block:
            raise ValueError(f"document and question must be multiples of {block}")
        self.document, self.questions, self.question, self.block = document, questions, question, block
        group = torch.arange(question + block, device=device)
        self.positions = torch.cat(
            [torch.arange(document, device=device), document + group.repeat(questions)]
        )
        self.part = torch.zeros(self.tokens, dtype=torch.int64, device=device)
        self.part[document:] = torch.arange(1, questions + 1, device=device).repeat_interleave(len(group))

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return self.document + self.questions * (self.question + self.block)

    @cached_property
    def answers(self) -> Tensor:
        """int64 [questions, block]: where in a row the answers stand."""
        starts = self.document + torch.arange(self.questions) * (self.question + self.block) + self.question
        return (starts[:, None] + torch.arange(self.block)).to(self.positions.device)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens at places `query` of a row see those at places `key`."""
        part = self.part[key]
        earlier = self.positions[key] // self.block <= self.positions[query] // self.block
        return ((part == 0) | (part == self.part[query])) & earlier

    def back(self, places: Tensor, offset: int) -> Tensor:
        """Where the token stands that precedes those at `places` by so many positions; -1 for none."""
        position = self.positions[places] - offset
        return torch.where(position >= self.document, places - offset, position.clamp(min=-1))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [rows, heads, tokens, head_dim] under the layout's mask."""
        if q.is_cuda:
            return _flex_attention()(q, k, v, block_mask=self._block_mask, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask, enable_gqa=True)

    @cached_property
    def _mask(self) -> Tensor:
        places = torch.arange(self.tokens, device=self.positions.device)
        return self.sees(places[:, None], places[None, :])

    @cached_property
    def _block_mask(self) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(
            lambda _row, _head, query, key: self.sees(query, key),
            *(None, None, self.tokens, self.tokens),
            device=str(self.positions.device),
        )


@lru_cache(maxsize=1)
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
