"""The layer stack, written once in terms of a backend."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableSet
from dataclasses import dataclass
from itertools import islice
from typing import Any

from losart.attention import AttentionPolicy, make_policy
from losart.backends.base import (
    Array,
    Backend,
    Batch,
    ExpertWeights,
    PassBody,
    PassOutput,
    Selection,
    Slot,
    Stack,
    Weight,
)
from losart.config.model import ExpertsConfig, ModelConfig
from losart.config.options import AttentionConfig, GenerationConfig
from losart.engine.batch import PassBatch, PassKind, PassResult
from losart.engine.kv_cache import PagedKVCache
from losart.engine.kv_pool import KVPool
from losart.engine.turns import Turns
from losart.models.observed import observed_layers

# A layer's matrices, and the checkpoint's that each joins.
ATTENTION = {"qkv": ("q", "k", "v"), "o": ("o",)}
FEED_FORWARD = {"gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class FeedForward:
    """down(silu(gate(x)) * up(x))."""

    gate_up: Weight
    down: Weight


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights as the backend holds them; None for the parts that a model has not."""

    input_norm: Array
    qkv: Weight
    qkv_bias: Array | None
    q_norm: Array | None
    k_norm: Array | None
    o: Weight
    o_bias: Array | None
    post_norm: Array
    feed_forward: FeedForward | ExpertWeights


class Transformer:
    """A block-diffusion transformer on one backend. Implements `losart.engine.engine.Runner`.

    Parameters
    ----------
    config : ModelConfig
    tensors : mapping
        The checkpoint's tensors by canonical name (`losart.loaders`).
    backend : Backend
    progress : callable, optional
        Called after each layer with the layers uploaded and in all.

    Attributes
    ----------
    matrix_bytes : dict of str to int
        What matrices take, by the formats that they are held in.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Any],
        backend: Backend,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.matrix_bytes = self.bytes_of_matrices(config, tensors, backend)
        self.embedding = backend.upload(tensors["embed"])
        self.layers = []
        for i in range(config.num_layers):
            self.layers.append(self._load_layer(tensors, i))
            if progress is not None:
                progress(i + 1, config.num_layers)
        self.final_norm = backend.upload_vector(tensors["final_norm"])
        # A head that is the embedding may have been quantized by itself.
        self.head = backend.upload(tensors["head"]) if "head" in tensors else self.embedding
        self.turns = Turns()
        self.pools: MutableSet[KVPool] = weakref.WeakSet()
        self.policies: dict[tuple[AttentionConfig, int], AttentionPolicy] = {}

    def _load_layer(self, tensors: Mapping[str, Any], index: int) -> LayerWeights:
        backend, prefix = self.backend, f"layers.{index}."
        parts = attention_parts(tensors, prefix) | FEED_FORWARD

        def weight(name: str) -> Weight:
            return backend.upload(*(tensors[prefix + part] for part in parts[name]))

        def vector(*names: str) -> Array:
            return backend.upload_vector(*(tensors[prefix + name] for name in names))

        c, experts = self.config, self.config.experts_of(index)
        feed_forward: FeedForward | ExpertWeights
        if experts is None:
            feed_forward = FeedForward(weight("gate_up"), weight("down"))
        else:
            feed_forward = ExpertWeights(
                experts,
                backend.upload(tensors[prefix + "router"]),
                vector("router_bias") if experts.bias else None,
                *backend.upload_experts(*_stacks(tensors, prefix, experts)),
            )
        return LayerWeights(
            input_norm=vector("input_norm"),
            qkv=weight("qkv"),
            qkv_bias=vector("q_bias", "k_bias", "v_bias") if c.qkv_bias else None,
            q_norm=vector("q_norm") if c.head_norms else None,
            k_norm=vector("k_norm") if c.head_norms else None,
            o=weight("o"),
            o_bias=vector("o_bias") if c.o_bias else None,
            post_norm=vector("post_norm"),
            feed_forward=feed_forward,
        )

    @staticmethod
    def bytes_of_matrices(
        config: ModelConfig, tensors: Mapping[str, Any], backend: Backend
    ) -> dict[str, int]:
        """What matrices take on a backend, by the formats that they are held in."""
        held = Counter[str]()
        for matrix in Transformer.matrices(config, tensors):
            held.update(backend.held(*matrix))
        for index in range(config.num_layers):
            if (experts := config.experts_of(index)) is not None:
                held.update(backend.held_experts(*_stacks(tensors, f"layers.{index}.", experts)))
        return dict(sorted(held.items()))

    @staticmethod
    def matrices(config: ModelConfig, tensors: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        """The tensors of each matrix that a backend is given, as `upload` takes them; not of experts."""
        for name in ("embed", "head"):
            if name in tensors:
                yield (tensors[name],)
        for index in range(config.num_layers):
            prefix, experts = f"layers.{index}.", config.experts_of(index)
            attention = attention_parts(tensors, prefix)
            for parts in (attention if experts else attention | FEED_FORWARD).values():
                yield tuple(tensors[prefix + part] for part in parts)
            if experts is not None:
                yield (tensors[prefix + "router"],)

    @property
    def kv(self) -> str:
        """The format in which keys and values are held."""
        return self.backend.precision.kv.name

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that go through the model at a time, about."""
        return self.backend.prefill_tokens

    @property
    def beside_tokens(self) -> int:
        """The same while other sequences wait for their passes."""
        return self.backend.beside_tokens

    @property
    def deterministic(self) -> bool:
        """Whether a sequence must not depend, not even by rounding, on what it shares."""
        return self.backend.deterministic

    @property
    def same_sums(self) -> bool:
        """Whether that is so of passes over blocks."""
        return self.backend.same_sums

    @property
    def max_sequences(self) -> int:
        """That share passes, unless somebody says otherwise."""
        return self.backend.max_sequences

    @property
    def batch_rows(self) -> int:
        """Rows that a pass over several sequences may have; 0: a pass has one sequence."""
        return self.backend.batch_rows

    def commits_ride(self, options: GenerationConfig) -> bool:
        """Whether a pass commits a block and begins the next one."""
        if self.config.decoding.seeds or options.edits:  # the next block waits for what a commit gives
            return False
        return self.policy(options).commits_ride and options.block_length in self.backend.riding_blocks

    def policy(self, options: GenerationConfig) -> AttentionPolicy:
        """The attention policy of these options.

        Raises
        ------
        OptionError
            There is no such method, or it does not go with another option.
        """
        key = (options.attention, options.block_length)
        if key not in self.policies:
            policy = make_policy(options.attention, self.config, options.block_length)
            self.policies.setdefault(
                key, policy
            )  # the only one of these options: captured passes are its own
        return self.policies[key]

    def check(self, options: GenerationConfig) -> None:
        """Raise OptionError where the options do not go together."""
        self.policy(options)

    def new_cache(self, options: GenerationConfig, expected: int) -> PagedKVCache:
        """An empty KV cache, expected to hold so many positions in the end."""
        return self.backend.new_cache(options.attention.page_size, expected)

    def new_slot(self, options: GenerationConfig) -> Slot | None:
        """Room for a sequence's stored results; None where its attention method stores none."""
        stored = self.policy(options).stored
        return None if stored is None else self.backend.new_slot(stored)

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        """Run one pass: proposals of some rows, or keys and values into the caches, or both.

        With `observe` the result says what each layer read of the prefix.
        """
        return self.begin(batch, observe)()

    def begin(self, batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        """Launch one pass; the function returned waits for its result, before the next is begun."""
        finish = self.backend.begin(batch, PassBody(self._pass, self._key(batch)), observe)
        return lambda: self._result(batch, finish(), observe)

    def _result(self, batch: PassBatch, output: PassOutput, observe: bool) -> PassResult:
        if batch.kind is PassKind.PREFILL:
            return PassResult()
        counted = iter(zip(output.positions, output.tokens, strict=True))
        reads = []
        for group, _ in batch.groups():
            policy, of_group = self.policy(group.options), list(islice(counted, len(group.sequences)))
            if policy.always_dense:
                reads += [policy.reads(group.kind, 0, 0)] * len(of_group)
            else:
                kinds = (one.kind for one in group.sequences)
                reads += [policy.reads(kind, *one) for kind, one in zip(kinds, of_group, strict=True)]
        if not observe:
            return PassResult(output.proposals, reads, experts_used=output.experts_used)
        layers = []
        for (group, _), selections in zip(batch.groups(), output.reads, strict=True):
            layers += observed_layers(selections, self.backend, group, self.config.num_kv_heads)
        return PassResult(output.proposals, reads, layers, output.experts_used)

    def _key(self, batch: PassBatch) -> Hashable:
        """What passes that launch the same operations have in common; None: it is not replayed."""
        if batch.kind is PassKind.PREFILL:
            return None
        key = []
        for group, _ in batch.groups():
            policy, kind = self.policy(group.options), group.kind
            of_policy = policy.key(kind)
            if of_policy is None or group.causal:
                return None
            key.append((PassKind.FIRST if policy.always_dense and kind.denoises else kind, of_policy))
        return batch.samples, batch.proposes, batch.keeps_logits, *key

    def _pass(self, batch: Batch) -> tuple[Any, list[list[Selection | None]]]:
        backend = self.backend
        prefills = batch.kind is PassKind.PREFILL
        linear = backend.prefill_linear if prefills else backend.linear
        x, delta = backend.embed(self.embedding, batch), None
        groups = [(group, rows, self.policy(group.options)) for group, rows in batch.groups()]
        reads: list[list[Selection | None]] = [[] for _ in groups]
        for index, layer in enumerate(self.layers):
            x, h = backend.add_rms_norm(x, delta, layer.input_norm)
            qkv = linear(h, layer.qkv, layer.qkv_bias)
            q, k, v = backend.split_heads(qkv, layer.q_norm, layer.k_norm, batch)
            parts = []
            for (group, rows, policy), read in zip(groups, reads, strict=True):
                qkv_of_group = (q, k, v) if len(groups) == 1 else (q[rows], k[rows], v[rows])
                o, selection = self._attention(policy, index, *qkv_of_group, group)
                parts.append(o)
                read.append(selection)
            o = parts[0] if len(parts) == 1 else backend.join(parts)
            delta = linear(o.reshape(len(o), -1), layer.o, layer.o_bias)
            x, h = backend.add_rms_norm(x, delta, layer.post_norm)
            if isinstance(layer.feed_forward, ExpertWeights):
                delta = backend.experts(h, layer.feed_forward, batch)
            else:
                gated = backend.gated_linear(h, layer.feed_forward.gate_up, prefills)
                delta = linear(gated, layer.feed_forward.down)
        _, hidden = backend.add_rms_norm(x, delta, self.final_norm)
        return (backend.propose(hidden, self.head, batch) if batch.proposes else None), reads

    def _attention(
        self, policy: AttentionPolicy, index: int, q: Array, k: Array, v: Array, group: Batch
    ) -> tuple[Array, Selection | None]:
        """Attention of a group's rows, and what it read; a commit's keys and values go into the cache."""
        backend, prefills = self.backend, group.kind is PassKind.PREFILL or group.causal
        if prefills or group.rides:
            backend.write_kv(index, k, v, group)
        if prefills:
            return backend.causal_attention(index, q, group), None
        found = policy.attend(backend, index, q, k, v, group)
        if group.kind is PassKind.COMMIT:  # after pages are selected by the bounds of those before it
            backend.write_kv(index, k, v, group)
        return found


def attention_parts(tensors: Mapping[str, Any], prefix: str) -> dict[str, tuple[str, ...]]:
    """`ATTENTION`; some checkpoints have q, k and v in one tensor."""
    return ATTENTION | ({"qkv": ("qkv",)} if f"{prefix}qkv" in tensors else {})


def _stacks(tensors: Mapping[str, Any], prefix: str, experts: ExpertsConfig) -> Iterator[Stack]:
    """The tensors that each expert's `gate_up` and `down` join, those of shared experts last."""
    for parts in FEED_FORWARD.values():
        yield [
            tuple(tensors[f"{prefix}experts.{expert}.{part}"] for part in parts)
            for expert in range(experts.count + experts.shared)
        ]
