"""What training minimises.

Beside the masked tokens' cross-entropy there are three losses that only training has. Without the first
two neither the heads of the first layer that look at earlier tokens, nor the head that copies what it
finds into the prediction, form within any time that is affordable. The third makes the pages that are
looked at easy to select. None of them waits for the GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from recall_rows import Rows
from row_layout import Layout
from small_sdar import SmallSdar
from torch import Tensor

from losart.config.options import AttentionConfig

RETRIEVAL_LAYER = 1
PAGE = AttentionConfig().page_size


def masked_cross_entropy(model: SmallSdar, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the masked tokens, and which of them come out right.

    Parameters
    ----------
    hidden : [rows, tokens, hidden]

    Returns
    -------
    loss : []
    right : bool [masked]
    """
    logits = model.logits(hidden.flatten(0, 1)[rows.masked]).float()
    return F.cross_entropy(logits, rows.targets), logits.argmax(-1) == rows.targets


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
    return -torch.where(there, found, 0.0).sum() / there.sum()


def copy_loss(model: SmallSdar, ids: Tensor, before: Tensor, samples: int) -> Tensor:
    """Head 0 of the retrieval layer, looking at a token alone, makes the model predict that token.

    Parameters
    ----------
    ids : int64 [rows, tokens]
    before : [rows, tokens, hidden]
        The residual stream before the retrieval layer.
    samples : int
        Tokens of all rows together.
    """
    layer, size = model.model.layers[RETRIEVAL_LAYER], model.shape.head_dim
    chosen = torch.randint(ids.numel(), (samples,), device=ids.device)
    x = layer.input_layernorm(before.flatten(0, 1)[chosen])
    value = F.linear(x, layer.self_attn.v_proj.weight[:size].to(x.dtype))
    moved = F.linear(value, layer.self_attn.o_proj.weight[:, :size].to(x.dtype))
    return F.cross_entropy(model.logits(model.model.norm(moved)).float(), ids.flatten()[chosen])


def page_bound_loss(model: SmallSdar, before: list[Tensor], layout: Layout, rows: Rows) -> Tensor:
    """A page that holds a fact, and that a head looks at, has the highest of QUEST's bounds.

    Cross-entropy over the document's pages of their bounds, for the answers' tokens `rows.looking` in
    all heads from the retrieval layer on. Each head counts by the share of its attention to the
    document that it pays to the right page: several heads of several layers find facts (the second of
    a chain, or the last of a key's, after the retrieval layer), and others have to look elsewhere.

    Parameters
    ----------
    before : sequence of [rows, tokens, hidden]
        The residual stream before each layer.
    """
    scale = model.shape.head_dim**-0.5
    page = (rows.sources // PAGE)[:, None, None, :, None]
    cos, sin = model.rotation(layout.positions)
    losses, weights = [], []
    for layer, stream in list(zip(model.model.layers, before, strict=True))[RETRIEVAL_LAYER:]:
        x = layer.input_layernorm(stream)
        asking = x.gather(1, rows.looking[..., None].expand(-1, -1, x.shape[-1]))
        q = layer.self_attn.queries(asking, cos[rows.looking][:, None], sin[rows.looking][:, None])
        k = layer.self_attn.keys(x[:, : layout.document], cos[: layout.document], sin[: layout.document])
        with torch.autocast(x.device.type, enabled=False):  # sums of many channels, to be compared
            k = k.float()[:, :, None]  # [rows, kv_heads, 1, document, head_dim]
            q = q.float().unflatten(1, (k.shape[1], -1))  # [rows, kv_heads, group, samples, head_dim]
            bounds = scale * page_bounds(q, k)
            with torch.no_grad():
                paid = (scale * q @ k.transpose(-1, -2)).softmax(-1).unflatten(-1, (-1, PAGE)).sum(-1)
        target = page.expand(*bounds.shape[:-1], 1)
        losses.append(-bounds.log_softmax(-1).gather(-1, target))
        weights.append(paid.gather(-1, target))
    weight = torch.stack(weights)
    return (weight * torch.stack(losses)).sum() / weight.sum()


def page_bounds(q: Tensor, k: Tensor) -> Tensor:
    """QUEST's upper bound of q . k over each page of k (arXiv 2406.10774).

    Parameters
    ----------
    q : [..., queries, head_dim]
    k : [..., pages * PAGE, head_dim]

    Returns
    -------
    [..., queries, pages]
        The sum over channels of max(q_d smallest_d, q_d largest_d), which is largest_d times what of q_d
        is positive and smallest_d times what is negative.
    """
    pages = k.unflatten(-2, (-1, PAGE))
    smallest, largest = pages.amin(-2), pages.amax(-2)
    return q.clamp(min=0) @ largest.transpose(-1, -2) + q.clamp(max=0) @ smallest.transpose(-1, -2)
