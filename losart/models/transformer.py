"""The layer stack of the Qwen3 architecture, written once in terms of a backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from losart.attention.policy import AttentionPolicy
from losart.attention.recorder import ReadRecorder
from losart.backends.base import Array, Matrix, PassInputs, SparseBackend
from losart.config.model import ModelConfig
from losart.config.options import GenerationConfig
from losart.engine.kv_cache import PagedKVCache
from losart.engine.sampling import Proposals
from losart.observe.observation import ObservedLayer, Progress, observed_layers

Attend = Callable[[int, Array, Array, Array], Array]  # layer, q, k, v -> o

Observed = tuple[ObservedLayer, ...] | None  # a pass's layers, where it is observed


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights as the backend holds them."""

    input_norm: Array
    qkv: Matrix
    qkv_bias: Array | None
    q_norm: Array
    k_norm: Array
    o: Matrix
    o_bias: Array | None
    post_norm: Array
    gate_up: Matrix
    down: Matrix


class Transformer:
    """A block-diffusion transformer on one backend.

    Parameters
    ----------
    config : ModelConfig
    tensors : mapping
        The checkpoint's tensors by canonical name (`losart.loaders`).
    backend : SparseBackend
    progress : callable, optional
        Called after each layer with the layers uploaded and in all.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Any],
        backend: SparseBackend,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.embedding = backend.upload(tensors["embed"])
        self.layers = []
        for i in range(config.num_layers):
            self.layers.append(self._load_layer(tensors, f"layers.{i}."))
            if progress is not None:
                progress(i + 1, config.num_layers)
        self.final_norm = backend.upload_vector(tensors["final_norm"])
        self.head = self.embedding if config.tie_embeddings else backend.upload(tensors["head"])
        self._recorders: dict[Hashable, ReadRecorder] = {}

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the prompt that go through the model at a time, about."""
        return self.backend.prefill_tokens

    def _load_layer(self, tensors: Mapping[str, Any], prefix: str) -> LayerWeights:
        backend = self.backend

        def matrix(*names: str) -> Matrix:
            return backend.upload(*(tensors[prefix + name] for name in names))

        def vector(*names: str) -> Array:
            return backend.upload_vector(*(tensors[prefix + name] for name in names))

        bias = self.config.attention_bias
        return LayerWeights(
            input_norm=vector("input_norm"),
            qkv=matrix("q", "k", "v"),
            qkv_bias=vector("q_bias", "k_bias", "v_bias") if bias else None,
            q_norm=vector("q_norm"),
            k_norm=vector("k_norm"),
            o=matrix("o"),
            o_bias=vector("o_bias") if bias else None,
            post_norm=vector("post_norm"),
            gate_up=matrix("gate", "up"),
            down=matrix("down"),
        )

    def _forward(self, ids: Array, cache: PagedKVCache, attend: Attend) -> Array:
        backend = self.backend
        x, delta = backend.embed(self.embedding, ids), None
        for index, layer in enumerate(self.layers):
            x, h = backend.add_rms_norm(x, delta, layer.input_norm)
            qkv = backend.linear(h, layer.qkv, layer.qkv_bias)
            q, k, v = backend.split_heads(qkv, layer.q_norm, layer.k_norm, cache)
            o = attend(index, q, k, v)
            delta = backend.linear(o.reshape(len(ids), -1), layer.o, layer.o_bias)
            x, h = backend.add_rms_norm(x, delta, layer.post_norm)
            delta = backend.linear(backend.silu_gate(backend.linear(h, layer.gate_up)), layer.down)
        return backend.add_rms_norm(x, delta, self.final_norm)[1]

    def prefill(self, ids: np.ndarray, cache: PagedKVCache, block_length: int) -> None:
        """Take whole blocks of known tokens into the cache.

        Parameters
        ----------
        ids : int [tokens]
            A multiple of `block_length`.
        cache : PagedKVCache
            Its length is a multiple of `block_length`, and grows by the tokens.
        block_length : int
        """

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            cache.write(layer, k, v)
            return self.backend.causal_attention(q, cache, layer, block_length)

        self.backend.run_prefill(ids, cache, lambda ids: self._forward(ids, cache, attend))
        cache.advance(len(ids))

    def denoise(
        self,
        inputs: PassInputs,
        cache: PagedKVCache,
        policy: AttentionPolicy,
        config: GenerationConfig,
        observe: bool = False,
    ) -> tuple[Proposals, Observed]:
        """One denoising pass over the block after the cache's prefix: a token for each masked row.

        With `observe` also what each layer read; else None.
        """

        def body(ids: Array, backend: Any) -> Any:
            def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
                return policy.attend(backend, layer, q, k, v, cache)

            return self.backend.propose(self._forward(ids, cache, attend), inputs, self.head, config)

        return self._run_pass("denoise", policy, config.sampling, inputs, cache, body, observe)

    def commit(
        self, ids: np.ndarray, cache: PagedKVCache, policy: AttentionPolicy, observe: bool = False
    ) -> Observed:
        """Take a finished block into the cache."""

        def body(ids: Array, backend: Any) -> None:
            def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
                o = policy.attend(backend, layer, q, k, v, cache)
                cache.write(layer, k, v)
                return o

            self._forward(ids, cache, attend)

        _, observed = self._run_pass("commit", policy, None, PassInputs(ids), cache, body, observe)
        cache.advance(len(ids))
        return observed

    def _run_pass(
        self,
        name: str,
        policy: AttentionPolicy,
        sampling: Hashable,
        inputs: PassInputs,
        cache: PagedKVCache,
        body: Callable[[Array, Any], Any],
        observe: bool,
    ) -> tuple[Any, Observed]:
        """Run `body` of the block's ids and of the backend as the policy talks to it."""
        policy.use(self.backend)
        shape: Hashable = (name, policy.shape, sampling)
        talked_to = self.backend.planned(policy.config.planner)
        if observe:
            # A shape of its own, so that a pass that is captured while it is observed keeps the noted
            # arrays; and the recorder is kept with it, since a replay does not come by here.
            shape = ("observed", shape)
            talked_to = self._recorders.setdefault(shape, ReadRecorder(talked_to))
        result, positions = self.backend.run_pass(shape, inputs, cache, lambda ids: body(ids, talked_to))
        policy.end_pass(positions)
        if not observe:
            return result, None
        return result, observed_layers(
            talked_to.reads,
            talked_to,
            kv_heads=self.config.num_kv_heads,
            tokens=len(inputs.ids),
            prefix_length=cache.length,
            page_size=cache.page_size,
        )
