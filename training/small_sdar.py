"""The architecture that losart runs (Qwen3's, as SDAR has it), in PyTorch, for training.

Parameters have the names of a Hugging Face checkpoint, so that the state dict is the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from row_layout import Layout
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model, by their names in config.json."""

    vocab_size: int
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True


class RMSNorm(nn.Module):
    """x over its root mean square, times a gain."""

    def __init__(self, size: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normed per head, then rotated."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        inner, kv_inner = (
            heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads)
        )
        self.q_proj = nn.Linear(shape.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_inner, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_inner, bias=False)
        self.o_proj = nn.Linear(inner, shape.hidden_size, bias=False)
        # Sharper attention from the start: circuits that look at one token form earlier.
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps, 1.5)
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps, 1.5)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [rows, heads, tokens, head_dim], and k and v [rows, kv_heads, tokens, head_dim]."""
        return self.queries(x, cos, sin), self.keys(x, cos, sin), self._heads(self.v_proj(x))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[rows, heads, tokens, head_dim], normed and rotated."""
        q = self._heads(self.q_proj(x))
        return rotate(self.q_norm(q), cos, sin).to(q.dtype)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[rows, kv_heads, tokens, head_dim], normed and rotated."""
        k = self._heads(self.k_proj(x))
        return rotate(self.k_norm(k), cos, sin).to(k.dtype)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.o_proj(layout.attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class SmallSdar(nn.Module):
    """A block-diffusion model with tied embeddings."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, head_dim] at some positions, float32."""
        size = self.shape.head_dim
        exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size
        angles = positions[:, None].double() * self.shape.rope_theta**-exponents
        angles = torch.cat([angles, angles], -1)
        return angles.cos().float(), angles.sin().float()

    def forward(self, ids: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the last norm, and the residual stream before each layer.

        Parameters
        ----------
        ids : int64 [rows, tokens]
        layout : Layout
            Positions of the tokens, and what each of them sees.
        """
        x = self.model.embed_tokens(ids)
        before = []
        cos, sin = self.rotation(layout.positions)
        for layer in self.model.layers:
            before.append(x)
            x = layer(x, cos, sin, layout)
        return self.model.norm(x), before

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel d turns with channel d + head_dim / 2."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
