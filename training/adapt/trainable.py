"""What training changes: all matrices and biases, or products of low rank; norms, and the mask's vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from losart.errors import OptionError

from .decoder import BIASES, HEAD_NORMS, MATRICES, NORMS, Shape, Weights
from .low_rank import factors


@dataclass(frozen=True)
class Lora:
    """Products of low rank.

    Attributes
    ----------
    rank : int
    alpha : float
        The product counts by alpha / rank.
    targets : tuple of str
        Kinds of matrices that have one, of `MATRICES`; the others stay as they are.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(MATRICES)

    @property
    def scale(self) -> float:
        """By what a product is multiplied."""
        return self.alpha / self.rank


class Trainable:
    """A base's weights, float32, and what training adds to them.

    Parameters
    ----------
    shape : Shape
    base : dict
        Embedding and output projection are not trained.
    lora : Lora or None
        None to train all matrices.
    seed : int

    Attributes
    ----------
    parameters : dict of str to Tensor
    """

    def __init__(self, shape: Shape, base: Weights, lora: Lora | None, seed: int = 0) -> None:
        self.shape, self.base, self.lora = shape, base, lora
        device = base["embed"].device
        generator = torch.Generator(device=device).manual_seed(seed)
        small = [kind for kind in (*NORMS, *HEAD_NORMS) if kind in base]
        large = [kind for kind in (*MATRICES, *BIASES) if kind in base and lora is None]
        whole = [*small, "final_norm", *large]
        self.parameters = {kind: base[kind].clone() for kind in whole}
        self.parameters["mask"] = base["mask"].clone() if "mask" in base else base["embed"].mean(0)
        for kind in lora.targets if lora is not None else ():
            layers, out, inner = base[kind].shape
            a = torch.randn(layers, lora.rank, inner, device=device, generator=generator) / math.sqrt(inner)
            self.parameters[f"{kind}.a"] = a
            self.parameters[f"{kind}.b"] = torch.zeros(layers, out, lora.rank, device=device)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def weights(self, dtype: torch.dtype) -> Weights:
        """All weights as they are now, with the mask's vector as "mask"."""
        weights = {kind: value.to(dtype) for kind, value in self.base.items()}
        for kind, value in self.parameters.items():
            if "." not in kind:
                weights[kind] = value.to(dtype)
        for kind in self.lora.targets if self.lora is not None else ():
            product = torch.bmm(self.parameters[f"{kind}.b"], self.parameters[f"{kind}.a"])
            weights[kind] = (self.base[kind] + self.lora.scale * product).to(dtype)
        return weights

    @torch.no_grad()
    def start(self, weights: Weights) -> None:
        """Begin with other weights of the same base, as near to them as products of the rank come.

        Raises
        ------
        OptionError
            Their biases are not the base's, and are not trained.
        """
        kept = [kind for kind in BIASES if kind in self.base and kind not in self.parameters]
        if any((weights[kind] != self.base[kind]).any() for kind in kept):
            raise OptionError("a LoRA cannot begin with weights whose biases are not the base's")
        for kind, value in self.parameters.items():
            if "." not in kind:
                value.copy_(weights[kind])
        for kind in self.lora.targets if self.lora is not None else ():
            a, b, _ = factors(weights[kind].float() - self.base[kind], self.lora.rank)
            self.parameters[f"{kind}.a"].copy_(a)
            self.parameters[f"{kind}.b"].copy_(b / self.lora.scale)


def lora_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Kinds of matrices, in their usual order.

    Raises
    ------
    OptionError
        One is unknown.
    """
    unknown = set(names) - set(MATRICES)
    if unknown:
        raise OptionError(f"targets must be among {', '.join(MATRICES)}, not {', '.join(sorted(unknown))}")
    return tuple(kind for kind in MATRICES if kind in names)


def detached(weights: Weights) -> Weights:
    """Without gradients."""
    return {kind: value.detach() for kind, value in weights.items()}
