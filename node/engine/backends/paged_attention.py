"""Attention of the sessions of a step over paged KV memory.

On a CPU sessions are treated one by one, in place in their pages, but for short ones with a row each, whose keys and
values are gathered for one operation. On a GPU, where launching an operation costs more than copying, sessions are
gathered together wherever padding them to the longest wastes little; with FlashAttention 3 installed, keys and values
in bf16 are read in place through page tables, for all sessions at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from node.engine.backends.interface import Rows
from node.engine.kv_cache import BlockKvCache

_MOST_GATHERED = 192
"""Positions up to which a CPU gathers several sessions: beyond, the copy costs more than operations."""

MOST_GATHERED_ON_GPU = 1 << 15
"""Positions, of all sessions together and with padding, that a GPU gathers at most: the copy takes memory."""

_FREE_SCORES = 1 << 22
"""Pairs of a row and a position that a GPU calculates in no time: so many may be padding."""


class AttentionView(Protocol):
    """What the next rows of a step attend to in a block."""

    def attend(self, queries: torch.Tensor, memory: BlockKvCache, scaling: float) -> torch.Tensor:
        """Return their attention f32 (rows, heads * head size); `queries`: of all rows of the step."""


@dataclass(frozen=True, slots=True)
class InPlaceAttention:
    """The positions that the rows of one session attend to; `mask` where not all of them see all."""

    span: slice
    visible: slice | torch.Tensor
    mask: torch.Tensor | None
    causal: bool

    def attend(self, queries: torch.Tensor, memory: BlockKvCache, scaling: float) -> torch.Tensor:
        """Return the attention of the session's rows."""
        queries = queries[self.span].to(memory.keys.dtype)
        rows, heads, size = queries.shape
        groups = memory.keys.shape[1]
        keys, values = (there[self.visible].transpose(0, 1).unsqueeze(0) for there in (memory.keys, memory.values))
        if rows == 1:
            # It attends to every position, so the heads of a group are passed as rows, and no key is repeated.
            grouped = queries.view(1, groups, heads // groups, size)
            attended = nn.functional.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
            return attended.reshape(1, heads * size).float()
        if queries.device.type != "cpu":  # no fp32 kernel there has grouped queries: it would materialise all scores
            keys, values = (each.repeat_interleave(heads // groups, dim=1) for each in (keys, values))
        attended = nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=self.mask,
            is_causal=self.causal,
            scale=scaling,
            enable_gqa=heads != keys.shape[1],
        )
        return attended[0].transpose(0, 1).reshape(rows, heads * size).float()


@dataclass(frozen=True, slots=True)
class GatheredAttention:
    """The positions that several sessions with a row each attend to.

    Their keys and values are gathered for one operation, as copying them costs less than many small operations.
    `visible`: the slots of each, padded to the longest. `mask`: (sessions, 1, 1, longest), f32 or whether a position is
    visible. `first`: the number of their first row.
    """

    visible: torch.Tensor
    mask: torch.Tensor
    first: int = 0

    def attend(self, queries: torch.Tensor, memory: BlockKvCache, scaling: float) -> torch.Tensor:
        """Return the attention of the sessions' rows."""
        rows, longest = len(self.mask), self.mask.shape[-1]
        _, heads, size = queries.shape
        groups = memory.keys.shape[1]
        keys, values = (
            there.index_select(0, self.visible).view(rows, longest, groups, size).transpose(1, 2)
            for there in (memory.keys, memory.values)
        )
        chosen = queries[self.first : self.first + rows].to(keys.dtype)
        grouped = chosen.view(rows, groups, heads // groups, size)
        attended = nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scaling)
        return attended.reshape(rows, heads * size).float()


@dataclass(frozen=True, slots=True)
class PaddedAttention:
    """The positions that several sessions attend to, with any number of rows each, in one operation.

    `rows`: the numbers of their rows, (sessions, most rows), padded with any. `chosen`: which of these are rows, in
    order. `visible`: the slots of each session, padded to the longest. `mask`: which positions a row sees, (sessions,
    most rows, longest).
    """

    rows: torch.Tensor
    chosen: torch.Tensor
    visible: torch.Tensor
    mask: torch.Tensor

    def attend(self, queries: torch.Tensor, memory: BlockKvCache, scaling: float) -> torch.Tensor:
        """Return the attention of the sessions' rows."""
        count, most, longest = self.mask.shape
        _, heads, size = queries.shape
        groups = memory.keys.shape[1]
        keys, values = (
            there.index_select(0, self.visible).view(count, longest, groups, size).transpose(1, 2)
            for there in (memory.keys, memory.values)
        )
        # The heads of a group are passed as rows, so that no key is repeated.
        given = queries[self.rows.flatten()].to(keys.dtype).view(count, most, groups, heads // groups, size)
        given = given.transpose(1, 2).reshape(count, groups, -1, size)
        mask = self.mask.repeat_interleave(heads // groups, dim=1).unsqueeze(1)
        attended = nn.functional.scaled_dot_product_attention(given, keys, values, attn_mask=mask, scale=scaling)
        attended = attended.view(count, groups, most, heads // groups, size).transpose(1, 2)
        return attended.reshape(count * most, heads * size)[self.chosen].float()


def views_on_cpu(slices: Sequence[Rows], window: int | None) -> list[AttentionView]:
    """Return what slices attend to, those with a single row, which come first, together where that pays."""
    single = [part for part in slices if len(part.rows) == 1]
    joint = _joint_view(single, window) if len(single) > 1 else None
    views: list[AttentionView] = [] if joint is None else [joint]
    start = 0
    for part in slices:
        count = len(part.rows)
        if joint is None or count > 1:
            views.append(_view(part, start, window, torch.device("cpu")))
        start += count
    return views


def views_on_gpu(slices: Sequence[Rows], window: int | None, device: torch.device) -> list[AttentionView]:
    """Return what slices attend to, as few views as padding allows. Those with as many rows are next to each other."""
    views: list[AttentionView] = []
    start = 0
    for group in joint_groups([(len(part.rows), _visible_count(part, window)) for part in slices]):
        parts = slices[group.start : group.stop]
        views.append(
            _view(parts[0], start, window, device) if len(parts) == 1 else padded_view(parts, start, window, device)
        )
        start += sum(len(part.rows) for part in parts)
    return views


def joint_groups(sizes: Sequence[tuple[int, int]]) -> list[range]:
    """Return which sessions, each with its rows and visible positions, are padded to one size.

    Consecutive ones, as long as not too much is padding, nor too much is gathered.
    """
    groups: list[range] = []
    start = rows = longest = needed = 0
    for number, (count, length) in enumerate(sizes):
        rows, longest, needed = max(rows, count), max(longest, length), needed + count * length
        together = number + 1 - start
        if together > 1 and (
            together * longest > MOST_GATHERED_ON_GPU or together * rows * longest - needed > max(needed, _FREE_SCORES)
        ):
            groups.append(range(start, number))
            start, rows, longest, needed = number, count, length, count * length
    return [*groups, range(start, len(sizes))]


def padded_view(slices: Sequence[Rows], start: int, window: int | None, device: torch.device) -> PaddedAttention:
    """Return what slices attend to together. `start`: the number of their first row in the step."""
    counts = torch.tensor([len(part.rows) for part in slices])
    firsts = torch.tensor([_first_visible(part, window) for part in slices])
    lengths = torch.tensor([_visible_count(part, window) for part in slices])
    number, offset = torch.arange(int(counts.max())), torch.arange(int(lengths.max()))
    is_row = number < counts.unsqueeze(1)
    starts = start + counts.cumsum(0) - counts
    rows = starts.unsqueeze(1) + torch.minimum(number, counts.unsqueeze(1) - 1)
    # Row r, at position + r, attends to itself and the positions before it within the window. Padded rows see all that
    # the last one sees, as a row that sees nothing has no attention.
    positions = torch.tensor([part.position for part in slices]).unsqueeze(1) + rows - starts.unsqueeze(1)
    distance = positions.unsqueeze(2) - (firsts.unsqueeze(1) + offset).unsqueeze(1)
    mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    visible = torch.stack(
        [
            # Padding is any slot of its own, which holds finite numbers: it is masked.
            part.slots.all[first + torch.minimum(offset, length - 1)]
            for part, first, length in zip(slices, firsts, lengths, strict=True)
        ]
    )
    chosen = is_row.flatten().nonzero().squeeze(1)
    return PaddedAttention(*(each.to(device) for each in (rows, chosen, visible.flatten(), mask)))


def _joint_view(single: Sequence[Rows], window: int | None) -> GatheredAttention | None:
    """Return what sessions with a row each attend to together, if that is little enough to be gathered."""
    firsts = [_first_visible(part, window) for part in single]
    counts = [part.position + 1 - first for part, first in zip(single, firsts, strict=True)]
    longest = max(counts)
    if longest > _MOST_GATHERED:
        return None
    visible = torch.zeros(len(single), longest, dtype=torch.long)
    mask = torch.full((len(single), 1, 1, longest), -torch.inf)
    for row, (part, first, count) in enumerate(zip(single, firsts, counts, strict=True)):
        slots = part.slots.all[first : first + count]
        visible[row, :count] = slots
        visible[row, count:] = slots[0]  # any slot of its own, which holds finite numbers: it is masked
        mask[row, ..., :count] = 0
    return GatheredAttention(visible.flatten(), mask)


def _view(part: Rows, start: int, window: int | None, device: torch.device) -> InPlaceAttention:
    first, count = _first_visible(part, window), len(part.rows)
    end, mask = part.position + count, None
    causal = count > 1 and part.position == 0 and (window is None or end <= window)
    if count > 1 and not causal:
        # Row r, at position + r, attends to itself and the positions before it within the window.
        distance = torch.arange(part.position, end).unsqueeze(1) - torch.arange(first, end)
        mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        mask = mask.to(device)
    visible = part.slots.of(first, end)
    visible = visible if isinstance(visible, slice) else visible.to(device)
    return InPlaceAttention(slice(start, start + count), visible, mask, causal)


def _first_visible(part: Rows, window: int | None) -> int:
    return 0 if window is None else max(0, part.position - window + 1)


def _visible_count(part: Rows, window: int | None) -> int:
    return part.position + len(part.rows) - _first_visible(part, window)
