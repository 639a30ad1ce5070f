"""Launches kernels, for one precision and one card."""

from __future__ import annotations

from typing import Any

from losart.backends.cuda.plans import Card, Plan, attention_bits
from losart.config.precision import Precision
from losart.kernels_cu import Defines, kernel
from losart.kernels_cu.constants import WARP_ROWS, WARP_ROWS_THREADS
from losart.kernels_cu.launch import Kernel


class Kernels:
    """The kernels of losart.kernels_cu, launched on the current stream.

    Parameters
    ----------
    precision : Precision
    card : Card
        What launches are planned for.
    deterministic : bool
        Whether sums must not depend on what else a pass has, or on how a prompt is cut into pieces.

    Attributes
    ----------
    tensor_matmul : bool
        Whether tensor cores can multiply activations by weights.
    float8_activations : bool
        Whether those of many tokens are rounded to E4M3 before they are multiplied by weights held so.
    kv_bits : int
        As of `attention_bits`.
    same_sums : bool
        Whether each row of a block is summed in the same order however many rows and sequences a pass has:
        where `deterministic`, and in float32, for which little depends on it.
    """

    def __init__(self, precision: Precision, card: Card, deterministic: bool = False) -> None:
        self.precision = precision
        self.card = card
        self.tensor_matmul = precision.weights.bits == precision.activations.bits == 16
        self.float8_activations = precision.float8_activations and self.tensor_matmul and card.hopper
        self.kv_bits = attention_bits(precision)
        self.deterministic = deterministic
        self.same_sums = deterministic or precision.activations.bits == 32
        self._loaded: dict[tuple[str, Defines], Kernel] = {}

    def launch(self, name: str, grid: tuple[int, ...], threads: int, *args: Any, shared: int = 0) -> None:
        """Launch a kernel; its parameters are arrays, numbers and views."""
        self._kernel(name, ())(grid, threads, *args, shared=shared)

    def launch_rows(
        self, name: str, tokens: int, heads: int, *args: Any, shared: int = 0, caches: int = 1
    ) -> None:
        """Launch a kernel with one warp per row, which is a head of a token of each cache."""
        self.launch(name, (tokens, -(-heads // WARP_ROWS), caches), WARP_ROWS_THREADS, *args, shared=shared)

    def launch_plan(self, plan: Plan, *args: Any, overlap: bool = True) -> None:
        """Launch a kernel as planned; without `overlap`, once the one before has ended."""
        sizes = plan.grid, plan.threads
        self._kernel(plan.kernel, plan.defines)(*sizes, *args, shared=plan.shared, overlap=overlap)

    def _kernel(self, name: str, defines: Defines) -> Kernel:
        # Not the cache behind `kernel`: hashing a precision takes longer than a launch should.
        loaded = self._loaded.get((name, defines))
        if loaded is None:
            loaded = self._loaded[name, defines] = kernel(name, self.precision, defines)
        return loaded
