"""Where a model may be cut into spans (at multiples of its granularity), and which parts of its span an engine runs.

Most models may be cut between any two blocks. In some the blocks' kinds follow a pattern that is counted from a span's
first block, such as one full attention in every six: cut elsewhere, the spans would calculate another model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, groupby

from protocol.identity import BlockRange


class Parts(IntEnum):
    """Which parts of its span an engine runs; each kind includes those before it.

    PREFIX suffices to join spans that cover all blocks, however they overlap: a route leaves each span where the next
    one begins.
    """

    WHOLE = 0
    PREFIX = 1
    """From the span's first block to any."""
    ANY = 2

    def include(self, part: BlockRange, span: BlockRange) -> bool:
        """Return whether a part of a span is among them."""
        return part == span or (self >= Parts.PREFIX and part.start == span.start) or self is Parts.ANY


@dataclass(frozen=True, slots=True)
class Cuts:
    """The places where a model of `block_count` blocks may be cut. Between two of them lies a unit.

    A granularity of `block_count` means that it may only be served whole.
    """

    block_count: int
    granularity: int = 1

    @property
    def unit_count(self) -> int:
        """Units of the whole model; the last one may have fewer blocks."""
        return -(-self.block_count // self.granularity)

    def around(self, blocks: BlockRange) -> BlockRange:
        """Return the smallest span that has these blocks."""
        return self.blocks_of(BlockRange(blocks.start // self.granularity, -(-blocks.end // self.granularity)))

    def units_of(self, blocks: BlockRange) -> BlockRange | None:
        """Return the units that lie within a range of blocks, if any."""
        start, end = -(-blocks.start // self.granularity), blocks.end // self.granularity
        end = self.unit_count if blocks.end == self.block_count else end
        return BlockRange(start, end) if start < end else None

    def blocks_of(self, units: BlockRange) -> BlockRange:
        """Return the blocks of a range of units."""
        return BlockRange(units.start * self.granularity, min(units.end * self.granularity, self.block_count))

    def uncovered(self, spans: Iterable[BlockRange]) -> tuple[BlockRange, ...]:
        """Return the blocks that no span covers; where there are none, the spans can be joined into a route.

        Spans that do not begin and end where the model may be cut calculate another model, and do not count.
        """
        coverage = self.coverage(spans)
        runs = ((count, list(run)) for count, run in groupby(range(self.block_count), coverage.__getitem__))
        return tuple(BlockRange(run[0], run[-1] + 1) for count, run in runs if not count)

    def coverage(self, spans: Iterable[BlockRange]) -> list[int]:
        """Return how many spans cover each block, of those that begin and end where the model may be cut."""
        change = [0] * (self.block_count + 1)
        for span in spans:
            if self.fault(span) is None:
                change[span.start] += 1
                change[span.end] -= 1
        return list(accumulate(change))[:-1]

    def fault(self, blocks: BlockRange) -> str | None:
        """Return why a span may not have these blocks, and the nearest that it may have; None where it may."""
        if blocks.end > self.block_count:
            return f"the model has blocks 0-{self.block_count}"
        around, units = self.around(blocks), self.units_of(blocks)
        if around == blocks:
            return None
        if self.unit_count == 1:
            return f"the model can only be served whole (0-{self.block_count}): cut, it would give other answers"
        within = "" if units is None else f"{self.blocks_of(units)} or "
        return (
            f"the model can be cut at multiples of {self.granularity} blocks only, or its answers would be others: "
            f"serve {within}{around}"
        )
