"""Runs the graphs of a span with numpy between them, without torch: continuous batching over paged KV memory.

Rows of many sessions are concatenated into one matrix, so that each weight is read once in a step for all of them. Only
attention treats the sessions one by one. Keys and values are kept in bf16, which loses less than the graphs' rounding
of activations, and is widened by a shift.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from node.engine.interface import PAGE_POSITIONS
from node.util.mapped_pages import drop_elements

if TYPE_CHECKING:  # it imports onnxruntime, which a worker needs only once a job names it
    from node.engine.graphs.sessions import SpanGraphs

Floats = npt.NDArray[np.float32]

_SCORES: Final = 1 << 22
"""Elements of attention scores that are in memory at once: rows that would take more are taken in pieces."""

_WARM_ROWS: Final = (1, 2, 8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What lies between the graphs of a span.

    `frequencies`: by which positions are multiplied, of each pair of elements that rotary embedding turns.
    `vocabulary_size`, `norm` (the final one, with its `epsilon`): of a last span.
    """

    block_count: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    frequencies: Floats
    vocabulary_size: int | None
    norm: Floats | None = None
    epsilon: float = 0.0


class PageSlots:
    """Slots of KV memory by position of a session: a slice where its pages are contiguous, else a list."""

    def __init__(self, pages: Sequence[int]) -> None:
        first = np.array(pages, np.int64)[:, None] * PAGE_POSITIONS
        self.all = (first + np.arange(PAGE_POSITIONS)).ravel()
        self._start = int(self.all[0]) if list(pages) == list(range(pages[0], pages[0] + len(pages))) else None

    def of(self, end: int) -> slice | npt.NDArray[np.int64]:
        """Return the slots of the positions before `end`, as an index."""
        return self.all[:end] if self._start is None else slice(self._start, self._start + end)


@dataclass(frozen=True, slots=True)
class GraphRows:
    """Rows of one session: token ids i64 (rows,), or hidden states f32 (rows, hidden size)."""

    rows: npt.NDArray[Any]
    slots: PageSlots
    position: int
    draws: int

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.position + len(self.rows)


class GraphSpan:
    """A span as graphs, and the KV memory of its sessions, which is the operating system's until it is written to."""

    def __init__(
        self,
        shape: AttentionShape,
        graphs: "SpanGraphs",
        positions: int,
        embed: Callable[[npt.NDArray[np.int32]], Floats] | None,
    ) -> None:
        """Warm the graphs. `embed`: returns the embeddings of tokens, on a first span."""
        self._shape = shape
        self._graphs = graphs
        self._embed = embed
        self._groups = shape.kv_heads
        self._scale = 1 / math.sqrt(shape.head_size)
        self._table = (np.empty(0, np.float32), np.empty(0, np.float32))
        self._make_memory(PAGE_POSITIONS)
        for count in _WARM_ROWS:
            width = () if embed else (shape.hidden_size,)
            rows = np.zeros((count, *width), np.int64 if embed else np.float32)
            self.run([GraphRows(rows, PageSlots([0]), 0, min(count, 2))])
        self._make_memory(positions)

    def _make_memory(self, positions: int) -> None:
        sizes = (self._shape.block_count, 2, positions, self._groups, self._shape.head_size)
        self._memory = np.empty(sizes, np.uint16)
        """By block, keys and values of every slot, the bits of bf16."""

    def copy(self, sources: Sequence[int], pages: Sequence[int]) -> None:
        """Copy whole pages."""
        for source, page in zip(sources, pages, strict=True):
            there, here = (slice(each * PAGE_POSITIONS, (each + 1) * PAGE_POSITIONS) for each in (source, page))
            self._memory[:, :, here] = self._memory[:, :, there]

    def give_back(self, pages: Sequence[int]) -> None:
        """Give the memory of pages, in order, back to the operating system, until they are written to again."""
        for memory in self._memory.reshape(-1, *self._memory.shape[2:]):  # keys or values of a block
            drop_elements(memory.ctypes.data, PAGE_POSITIONS * memory[0].nbytes, pages)

    def run(self, slices: Sequence[GraphRows], *, embeds: bool = False) -> list[Floats]:
        """Return for each the hidden states of its rows; behind the model's last block logits after its draws.

        `embeds`: instead of logits, the states of all rows behind the model's final norm.
        """
        hidden = np.concatenate([part.rows for part in slices])
        if self._embed is not None:
            hidden = self._embed(hidden.astype(np.int32))
        cos, sin = self._rotary(slices)
        slots = np.concatenate([part.slots.all[part.position : part.end] for part in slices])
        rotated, values = self._graphs.run(0, {"hidden": hidden, "cos": cos, "sin": sin})
        for block in range(self._shape.block_count):
            attended = self._attend(block, slices, slots, rotated, values)
            given = {"hidden": hidden, "attended": attended}
            if block + 2 == len(self._graphs):
                [hidden] = self._graphs.run(block + 1, given)
            else:
                hidden, rotated, values = self._graphs.run(block + 1, {**given, "cos": cos, "sin": sin})
        edges = np.cumsum([len(part.rows) for part in slices])
        if embeds and self._shape.norm is not None:
            squares = np.square(hidden).mean(axis=1, keepdims=True)
            hidden = hidden / np.sqrt(squares + np.float32(self._shape.epsilon)) * self._shape.norm
        if self._shape.vocabulary_size is None or embeds:
            return np.split(hidden, edges[:-1])
        if not any(part.draws for part in slices):
            return [np.empty((0, self._shape.vocabulary_size), np.float32)] * len(slices)
        drawn = [hidden[end - part.draws : end] for part, end in zip(slices, edges, strict=True)]
        logits = self._graphs.logits(np.concatenate(drawn))
        return np.split(logits, np.cumsum([part.draws for part in slices])[:-1])

    def _rotary(self, slices: Sequence[GraphRows]) -> tuple[Floats, Floats]:
        """Return cosines and sines of the rows, (rows, half of the head size) each."""
        end = max(part.end for part in slices)
        if end > len(self._table[0]):
            positions = np.arange(max(end, 2 * len(self._table[0]), PAGE_POSITIONS), dtype=np.float32)
            angles = positions[:, None] * self._shape.frequencies
            self._table = np.cos(angles), np.sin(angles)
        rows = np.concatenate([np.arange(part.position, part.end) for part in slices])
        return self._table[0][rows], self._table[1][rows]

    def _attend(
        self, block: int, slices: Sequence[GraphRows], slots: npt.NDArray[np.int64], rotated: Floats, values: Floats
    ) -> Floats:
        """Write the rows' keys and values to the KV memory; return their attention: (rows, heads * size)."""
        heads, groups, size = self._shape.heads, self._groups, self._shape.head_size
        split = rotated.reshape(-1, heads + groups, size)
        keys_memory, values_memory = self._memory[block]
        keys_memory[slots] = _narrowed(split[:, heads:])
        values_memory[slots] = _narrowed(values).reshape(-1, groups, size)
        queries = split[:, :heads] * np.float32(self._scale)
        attended = np.empty_like(queries)
        start = 0
        for part in slices:
            index = part.slots.of(part.end)
            keys, kept = _widened(keys_memory[index]), _widened(values_memory[index])
            keys, kept = keys.transpose(1, 2, 0), kept.transpose(1, 0, 2)
            count = max(1, _SCORES // (heads * part.end))
            for first in range(0, len(part.rows), count):
                last = min(len(part.rows), first + count)
                seen = part.position + last
                rows = queries[start + first : start + last]
                attended[start + first : start + last] = _attention(rows, keys[..., :seen], kept[:, :seen])
            start += len(part.rows)
        return attended.reshape(len(attended), heads * size)


def _narrowed(values: Floats) -> npt.NDArray[np.uint16]:
    """Return the bits of the nearest bf16, of two the even one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16).astype(np.uint16)


def _widened(bits: npt.NDArray[np.uint16]) -> Floats:
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def _attention(queries: Floats, keys: Floats, values: Floats) -> Floats:
    """Return the attention of consecutive rows, of which the last sees all positions.

    `queries`: (rows, heads, size), scaled. `keys`: (groups, size, positions). `values`: (groups, positions, size).
    """
    rows, heads, size = queries.shape
    groups, _, positions = keys.shape
    grouped = queries.reshape(rows, groups, heads // groups, size).transpose(1, 0, 2, 3).reshape(groups, -1, size)
    scores = np.matmul(grouped, keys)
    if rows > 1:
        hidden = np.arange(positions) > np.arange(positions - rows, positions)[:, None]
        scores.reshape(groups, rows, heads // groups, positions)[
            :, hidden[:, None].repeat(heads // groups, 1)
        ] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    summed = np.matmul(scores, values) / scores.sum(axis=-1, keepdims=True)
    attended: Floats = summed.reshape(groups, rows, heads // groups, size).transpose(1, 0, 2, 3)
    return attended.reshape(rows, heads, size)
