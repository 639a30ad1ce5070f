"""What training minimises.

Beside the masked tokens' cross-entropy there are two losses that only training has: without them neither
the heads of the first layer that look at earlier tokens, nor the head that copies what it finds into the
prediction, form within any time that is affordable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from row_layout import Layout
from small_sdar import SmallSdar
from torch import Tensor

RETRIEVAL_LAYER = 1


def masked_cross_entropy(
    model: SmallSdar, hidden: Tensor, answers: Tensor, masked: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' masked tokens, and which of them come out right.

    Parameters
    ----------
    hidden : [rows, tokens, hidden]
    answers : int64 [rows, questions, block]
    masked : bool [rows, questions, block]

    Returns
    -------
    loss : []
    right : bool [masked tokens]
    """
    logits = model.logits(hidden[:, layout.answers][masked]).float()
    return F.cross_entropy(logits, answers[masked]), logits.argmax(-1) == answers[masked]


def look_back_loss(
    model: SmallSdar, ids: Tensor, layout: Layout, offsets: tuple[int, ...], samples: int
) -> Tensor:
    """Head j of the first layer looks at the token `offsets[j]` positions before its own.

    -log of the attention weight of that token, over `samples` places of a row.
    """
    first = model.model.layers[0]
    x = first.input_layernorm(model.model.embed_tokens(ids))
    q, k, _ = first.self_attn.project(x, *model.rotation(layout.positions))
    places = torch.randint(layout.tokens, (samples,), device=ids.device)
    heads = len(offsets)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :heads]
    scores = (q[:, :heads, places] @ k.transpose(-1, -2)).float() * model.shape.head_dim**-0.5
    everywhere = torch.arange(layout.tokens, device=ids.device)
    seen = layout.sees(places[:, None], everywhere[None, :])
    weights = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    targets = torch.stack([layout.back(places, offset) for offset in offsets])  # [heads, samples]
    found = weights.gather(-1, targets.clamp(min=0).expand(len(ids), -1, -1)[..., None])[..., 0]
    there = (targets >= 0).expand_as(found)
    return -found[there].mean()


def copy_loss(model: SmallSdar, ids: Tensor, kept: Tensor, samples: int) -> Tensor:
    """Head 0 of the retrieval layer, looking at a token alone, makes the model predict that token.

    Parameters
    ----------
    ids : int64 [rows, tokens]
    kept : [rows, tokens, hidden]
        The residual stream before the retrieval layer.
    samples : int
        Tokens of all rows together.
    """
    layer, size = model.model.layers[RETRIEVAL_LAYER], model.shape.head_dim
    chosen = torch.randint(ids.numel(), (samples,), device=ids.device)
    x = layer.input_layernorm(kept.flatten(0, 1)[chosen])
    value = F.linear(x, layer.self_attn.v_proj.weight[:size].to(x.dtype))
    moved = F.linear(value, layer.self_attn.o_proj.weight[:, :size].to(x.dtype))
    return F.cross_entropy(model.logits(model.model.norm(moved)).float(), ids.flatten()[chosen])
