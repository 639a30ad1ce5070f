"""A pass on the device: what host and device exchange about it, and what operations get as `batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from losart.backends.cuda.pages import CudaPageTable
from losart.backends.cuda.pass_inputs import PassInputs, divide_prefixes
from losart.backends.cuda.plans import Plan
from losart.backends.cuda.slots import Slot
from losart.config.options import GenerationConfig
from losart.engine.batch import PassBatch, PassKind, SequencePass
from losart.engine.sampling import float32_temperature
from losart.kernels_cu.views import BatchView, CachesView, StoredView

LARGEST_TOP_K = 2**31 - 1


@dataclass(frozen=True)
class GroupShape:
    """What groups that are launched alike have in common.

    Attributes
    ----------
    caches, sequences : int
        Those that pad the group included. A cache has two sequences where its commit rides, else one.
    rides : bool
        Whether commits ride: all, or with `mixed` those of the first caches.
    tokens : int
        Rows of a sequence.
    proposes : bool
    page_size, chunk_positions, max_chunks : int
        Of the caches' page tables.
    pages : int
        Of a prefix at most; 0 where nothing depends on it.
    mixed : bool
        Whether some caches may have two sequences and others one: how many have two, the device is told.
    """

    caches: int
    sequences: int
    rides: bool
    tokens: int
    proposes: bool
    page_size: int
    chunk_positions: int
    max_chunks: int
    pages: int
    mixed: bool

    @property
    def per_cache(self) -> int:
        """Sequences of a cache, at most."""
        return 1 + self.rides

    @property
    def most_caches(self) -> int:
        """Caches if none has two sequences, where that may be."""
        return self.sequences if self.mixed else self.caches

    @property
    def rows(self) -> int:
        """Rows, those that pad the group included."""
        return self.sequences * self.tokens

    @property
    def proposing(self) -> int:
        """Rows that may propose tokens."""
        return self.caches * self.tokens if self.proposes else 0


def group_shape(group: PassBatch, max_positions: int) -> GroupShape:
    """The shape of a group, whose caches are padded to one of few numbers.

    A single prefix may have any number of pages that the model takes, so that one captured pass serves it as
    it grows; several, whose page scores would take too much memory, a power of two.
    """
    first, rides, table = group.sequences[0], group.rides, group.sequences[0].cache.table
    count, page_size, proposes = (
        len(group.sequences),
        table.page_size,
        any(len(one.proposed) for one in group.sequences),
    )
    caches, pages, mixed = count - riding(group), -(-max_positions // page_size), False
    if caches > 1 and first.options.attention.method == "dense":
        pages, mixed = 0, True
    elif caches > 1:
        longest = max(sequence.prefix_length for sequence in group.sequences)
        pages = min(pages, 1 << max(0, -(-longest // page_size) - 1).bit_length())
    sequences = padded(count) if mixed else padded(caches) * (1 + rides)
    sizes = page_size, table.positions_per_chunk, table.max_chunks
    return GroupShape(padded(caches), sequences, rides, len(first.ids), proposes, *sizes, pages, mixed)


def riding(group: PassBatch) -> int:
    """Caches whose commit rides: the first ones."""
    if not group.rides:
        return 0
    sequences = group.sequences
    count = sum(not one.kind.denoises for one in sequences)
    assert all(
        one.cache is after.cache for one, after in zip(*[iter(sequences[: 2 * count])] * 2, strict=True)
    )
    return count


def padded(count: int) -> int:
    """So many or up to an eighth more."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


class BatchBuffers:
    """A pass's inputs and results in device memory that stays in place, so that a graph can be replayed.

    Parameters
    ----------
    shapes : tuple of GroupShape
    plans : sequence of Plan
        Of each group's dense prefix attention.
    rotated : int
        Channels of a head that are rotated.

    Attributes
    ----------
    device : SimpleNamespace
        slots, tables : uint64 [sequences], addresses of stored results and of page tables, 0 for none.
        lengths : int32 [sequences], of the prefixes.
        ids, positions, is_masked : int32 [rows]
        rotations : float32 [rows, 2, rotated / 2], made from the positions on the device.
        proposed_count : int32 [1]
        proposed, logits, mask_token, top_k : int32 [proposing rows], temperature : float32, uniforms, top_p :
        float64, of all proposing rows one after the other: the row, that of its logits, and how it is
        sampled.
        riding : int32 [groups], caches whose commits ride.
        starts : int32 [caches + 1 of all groups], owners : int32 [parts of all groups], of dense prefix
        attention: every cache's first part, and every part's cache, -1 for none.
        experts_used : int32 [1], by tokens of this pass, summed over layers.
        reads : int32 [sequences, 2], by sparse attention in this pass: positions, and tokens that read them,
        summed over layers.
    results : int32 [4, proposing rows]
        Of sampling.
    gathers : bool
        Whether logits are made of proposing rows alone, one after the other.
    view : BatchView
    views : dict
        Of layers of the groups' caches.
    tables : dict
        Copies of page tables, of groups that have one cache.
    """

    def __init__(self, shapes: tuple[GroupShape, ...], plans: Sequence[Plan], rotated: int) -> None:
        self.shapes = shapes
        self._plans = plans
        sequences, rows, proposing = (
            sum(getattr(shape, name) for shape in shapes) for name in ("sequences", "rows", "proposing")
        )
        self.gathers = proposing > 0 and (len(shapes) > 1 or shapes[0].caches > 1)
        planned = [
            (s.most_caches + 1, p.parts) if s.caches > 1 else (0, 0)
            for s, p in zip(shapes, plans, strict=True)
        ]
        starts, owners = (np.cumsum([0, *sizes]) for sizes in zip(*planned, strict=True))
        self._parts = [
            (slice(*starts[i : i + 2]), slice(*owners[i : i + 2])) if shape.caches > 1 else None
            for i, shape in enumerate(shapes)
        ]
        fields = (
            *((name, np.uint64, sequences) for name in ("slots", "tables")),
            *((name, np.float64, proposing) for name in ("uniforms", "top_p")),
            ("lengths", np.int32, sequences),
            *((name, np.int32, rows) for name in ("ids", "positions", "is_masked")),
            ("proposed_count", np.int32, 1),
            *((name, np.int32, proposing) for name in ("proposed", "logits", "mask_token", "top_k")),
            ("temperature", np.float32, proposing),
            ("starts", np.int32, starts[-1]),
            ("owners", np.int32, owners[-1]),
            ("riding", np.int32, len(shapes)),
            ("experts_used", np.int32, 1),
            ("reads", np.int32, 2 * sequences),
        )
        size = sum(count * np.dtype(dtype).itemsize for _, dtype, count in fields)
        memory = cupy.zeros(size + 16 * proposing, np.uint8)
        # These are written from both sides: zeroed by the host, counted by the device.
        self._from_host, to_host = memory[:size], memory[size - 8 * sequences - 4 :]
        self._to_host = to_host.view(np.int32)
        self._words = np.zeros(size, np.uint8)
        self.device, self._host = _fields(self._from_host, fields), _fields(self._words, fields)
        self.device.reads = self.device.reads.reshape(sequences, 2)
        names = "slots", "tables", "lengths", "ids", "positions", "is_masked", "proposed"
        self._inputs = PassInputs(*(getattr(self._host, name) for name in names))
        self._offsets = np.arange(proposing, dtype=np.int32)
        self.device.rotations = cupy.empty((rows, 2, rotated // 2), np.float32)
        self.results = self._to_host[1 + 2 * sequences :].reshape(4, proposing)
        self.view = BatchView(*(getattr(self.device, name).data.ptr for name, *_ in BatchView._fields_))
        self.views: dict[tuple[int, int], CachesView] = {}
        self.tables = {
            i: cupy.empty((2, shape.max_chunks), np.uint64)
            for i, shape in enumerate(shapes)
            if shape.caches == 1
        }
        self._copied: dict[int, tuple[int, int]] = {}

    def parts(self, index: int) -> tuple[Any, Any]:
        """`starts` and `owners` of a group; None, None for one cache."""
        slices = self._parts[index]
        return (
            (None, None) if slices is None else (self.device.starts[slices[0]], self.device.owners[slices[1]])
        )

    def fill(self, batch: PassBatch, scratch: Sequence[int], stream: Any) -> None:
        """Copy a pass's inputs to the device, all at once.

        `scratch` has for each group the address of a slot for the sequences that pad it.
        """
        host, first, row, proposed = self._host, 0, 0, 0
        for index, ((group, _), shape) in enumerate(zip(batch.groups(), self.shapes, strict=True)):
            if shape.caches == 1:
                self._copy_table(index, group.sequences[0].cache.table, stream)
            padded = shape.tokens, shape.sequences, scratch[index]
            proposed = self._inputs.fill(group.sequences, *padded, stream, first, row, proposed)
            host.riding[index] = two = riding(group)
            if (parts := self._parts[index]) is not None:
                lengths = host.lengths[first : first + shape.sequences]
                with_two = two if shape.mixed else shape.caches * shape.rides  # those that pad the group, too
                to = host.starts[parts[0]], host.owners[parts[1]]
                divide_prefixes(lengths, with_two, self._plans[index], *to)
            first, row = first + shape.sequences, row + shape.rows
        if proposing := [one for one in batch.sequences if len(one.proposed)]:
            self._fill_proposed(proposed, proposing)
        self._from_host.set(self._words, stream=stream)  # has read pageable memory when it returns

    def _copy_table(self, index: int, table: CudaPageTable, stream: Any) -> None:
        """Have a single cache's page table where kernels find it without looking for its address first."""
        table.place(stream)
        copied = table.number, table.placed
        if self._copied.get(index) != copied:
            to = self.tables[index]
            to.data.copy_from_device_async(table.addresses.data, to.nbytes, stream)
            self._copied[index] = copied

    def _fill_proposed(self, count: int, sequences: list[SequencePass]) -> None:
        host, options = self._host, [one.options for one in sequences]
        host.proposed_count[0] = count
        host.logits[:count] = self._offsets[:count] if self.gathers else sequences[0].proposed
        counts = [len(one.proposed) for one in sequences]
        differing = options[:1] if all(one is options[0] for one in options) else options

        def spread(to: np.ndarray, value: Callable[[GenerationConfig], Any]) -> None:
            values = [value(one) for one in differing]
            alike = values.count(values[0]) == len(values)
            to[:count] = values[0] if alike else np.repeat(np.array(values, to.dtype), counts)

        spread(host.mask_token, attrgetter("mask_token_id"))
        host.temperature[:count] = 0
        if not any(one.temperature for one in options):
            return  # greedy ones do not look at the rest
        temperatures = [float32_temperature(one.temperature) for one in sequences]
        host.temperature[:count] = np.repeat(temperatures, counts)
        spread(host.top_p, attrgetter("top_p"))
        spread(host.top_k, lambda one: min(one.top_k, LARGEST_TOP_K))
        first = 0
        for one, of_one in zip(sequences, counts, strict=True):
            if one.uniforms is not None:
                host.uniforms[first : first + of_one] = one.uniforms[one.proposed]
            first += of_one

    @property
    def proposed_count(self) -> int:
        """Rows that propose tokens, of all sequences."""
        return int(self._host.proposed_count[0])

    @property
    def proposed_logits(self) -> np.ndarray:
        """Those rows among those of logits."""
        return self._host.logits[: self.proposed_count]

    def fetch(self, stream: Any = None) -> tuple[np.ndarray, np.ndarray, int]:
        """Reads, results and used experts, when the stream (None: the current one) has reached this point."""
        words, reads = self._to_host.get(stream), self.device.reads
        results = words[1 + reads.size :].reshape(self.results.shape)
        return words[1 : 1 + reads.size].reshape(reads.shape), results, int(words[0])


def _fields(memory: Any, fields: Sequence[tuple[str, Any, int]]) -> SimpleNamespace:
    """Arrays one after the other in some bytes, those of the largest values first."""
    named, start = {}, 0
    for name, dtype, count in fields:
        end = start + count * np.dtype(dtype).itemsize
        named[name], start = memory[start:end].view(dtype), end
    return SimpleNamespace(**named)


class DeviceBatch:
    """A pass, or a group of its sequences, as the backend's operations get it.

    Parameters
    ----------
    batch : PassBatch
        What of it differs from pass to pass must not decide what is launched, if that is captured.
    buffers : BatchBuffers
    index : int or None
        Of the group; None: of the only one, or of a pass of several groups, which is for operations that take
        each row by itself.

    Attributes
    ----------
    sequences : tuple of SequencePass
    kind : PassKind
    rides : bool
    options : GenerationConfig
    proposes, samples, keeps_logits : bool
        Whether it proposes tokens, whether some of them are drawn, and whether logits come to the host.
    shape : GroupShape
    view : BatchView
    tokens : int
        Rows, those that pad it included.
    """

    def __init__(self, batch: PassBatch, buffers: BatchBuffers, index: int | None = None) -> None:
        self._batch = batch
        self._index = index or 0
        self.buffers = buffers
        self.sequences = batch.sequences
        self.shape = buffers.shapes[self._index]
        self.view = buffers.view
        groups = len(buffers.shapes) if index is None else 1
        self.tokens = self.shape.rows if groups == 1 else sum(shape.rows for shape in buffers.shapes)

    def groups(self) -> list[tuple[DeviceBatch, slice]]:
        """Its groups, with their rows."""
        shapes = self.buffers.shapes
        if len(shapes) == 1:
            return [(self, slice(0, self.tokens))]
        groups, row = [], 0
        for index, ((group, _), shape) in enumerate(zip(self._batch.groups(), shapes, strict=True)):
            groups.append((DeviceBatch(group, self.buffers, index), slice(row, row + shape.rows)))
            row += shape.rows
        return groups

    # As the batch has them; a pass that is replayed asks for none of these.

    @property
    def kind(self) -> PassKind:
        return self._batch.kind

    @property
    def rides(self) -> bool:
        return self._batch.rides

    @property
    def causal(self) -> bool:
        return self._batch.causal

    @property
    def proposes(self) -> bool:
        return self._batch.proposes

    @property
    def samples(self) -> bool:
        return self._batch.samples

    @property
    def keeps_logits(self) -> bool:
        return self._batch.keeps_logits

    @property
    def options(self) -> GenerationConfig:
        return self._batch.options

    def fetch_logits(self, logits: Any, stream: Any) -> np.ndarray:
        """The rows of those sequences that keep them, of logits [rows, vocab] on the device."""
        found, last = list[np.ndarray](), 0
        for one in self.sequences:
            first, last = last, last + len(one.proposed)
            if one.keeps_logits and last > first:
                rows = self.buffers.proposed_logits[first:last]
                of_one = logits[rows[0] : rows[-1] + 1].get(stream)
                found.append(of_one if len(of_one) == len(rows) else of_one[rows - rows[0]])
        return found[0] if len(found) == 1 else np.concatenate(found)

    @property
    def placed(self) -> slice | list[int]:
        """Where each sequence is among those that pad the groups."""
        if len(self.buffers.shapes) == 1:
            return slice(0, len(self.sequences))
        found: list[int] = []
        first = 0
        for (group, _), shape in zip(self._batch.groups(), self.buffers.shapes, strict=True):
            found += range(first, first + len(group.sequences))
            first += shape.sequences
        return found

    @property
    def table(self) -> CudaPageTable:
        """A cache's, all of which have the same sizes."""
        return self.sequences[0].cache.table

    @property
    def max_pages(self) -> int:
        """Pages of the longest prefix that a pass launched alike can have."""
        assert self.shape.pages, "dense attention does not count pages"
        return self.shape.pages

    @property
    def mark_words(self) -> int:
        """Words of 32 bits that have a bit for each of those pages."""
        return -(-self.max_pages // 32)

    @property
    def slot(self) -> Slot:
        """A sequence's stored results, all of which are laid out alike."""
        return self.sequences[-1].slot

    def caches_view(self, layer: int) -> CachesView:
        """A layer of the caches."""
        views, key = self.buffers.views, (self._index, layer)
        if key not in views:
            table, device = self.table, self.buffers.device
            copy = self.buffers.tables.get(self._index)
            tables, lengths = (array[self._first :].data.ptr for array in (device.tables, device.lengths))
            addresses = (tables, None, lengths) if copy is None else (None, copy.data.ptr, lengths)
            sizes = self.shape.chunk_positions, self.shape.page_size, self.shape.max_chunks
            views[key] = CachesView(*addresses, layer, table.kv_heads, table.head_dim, *sizes)
        return views[key]

    @property
    def parts(self) -> tuple[Any, Any]:
        """Of dense prefix attention: every cache's first part, and every part's cache; None for one cache."""
        return self.buffers.parts(self._index)

    @property
    def riding(self) -> Any | None:
        """int32 [1], of a group with `mixed` caches how many have two sequences; None: all have as many."""
        mixed = self.shape.mixed and self.shape.rides
        return self.buffers.device.riding[self._index :] if mixed else None

    @property
    def is_masked(self) -> Any:
        """int32 [rows], 1 for masked ones."""
        first = sum(shape.rows for shape in self.buffers.shapes[: self._index])
        return self.buffers.device.is_masked[first : first + self.tokens]

    @property
    def reads(self) -> Any:
        """int32 [sequences, 2]: positions that sparse attention has read, and tokens that read them."""
        return self.buffers.device.reads[self._first :]

    def stored(self, name: str, layer: int) -> StoredView:
        """A layer of an array in the sequences' slots."""
        return StoredView(self.buffers.device.slots[self._first :].data.ptr, self.slot.offset(name, layer))

    @property
    def stored_pages_shape(self) -> tuple[int, int, int]:
        """kv heads, rows and count of the top pages in a layer of a slot: no more than there can be."""
        stored = self.slot.stored
        count = min(stored.top_pages, -(-self.table.max_positions // self.shape.page_size))
        return self.table.kv_heads, stored.top_pages_rows, count

    @property
    def _first(self) -> int:
        """Sequences of the groups before."""
        return sum(shape.sequences for shape in self.buffers.shapes[: self._index])
