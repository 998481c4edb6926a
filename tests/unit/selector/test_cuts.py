"""Where a model may be cut."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.identity import BlockRange
from selector.cuts import Cuts


@st.composite
def spans(draw: st.DrawFn) -> tuple[Cuts, BlockRange]:
    block_count = draw(st.integers(1, 30))
    start = draw(st.integers(0, block_count - 1))
    cuts = Cuts(block_count, draw(st.integers(1, block_count)))
    return cuts, BlockRange(start, draw(st.integers(start + 1, block_count)))


@given(spans())
def test_a_span_begins_and_ends_where_the_model_may_be_cut(case: tuple[Cuts, BlockRange]) -> None:
    cuts, blocks = case
    places = {*range(0, cuts.block_count, cuts.granularity), cuts.block_count}
    around, units = cuts.around(blocks), cuts.units_of(blocks)
    assert around.holds(blocks)
    assert {around.start, around.end} <= places
    assert not places.intersection(range(around.start + 1, blocks.start + 1)), "there is no smaller one"
    assert not places.intersection(range(blocks.end, around.end))
    assert (cuts.fault(blocks) is None) == ({blocks.start, blocks.end} <= places)
    if units is None:
        return
    inside = cuts.blocks_of(units)
    assert blocks.holds(inside)
    assert {inside.start, inside.end} <= places
    assert not places.intersection({*range(blocks.start, inside.start), *range(inside.end + 1, blocks.end + 1)})


def test_spans_that_may_not_be_cut_there_cover_nothing() -> None:
    spans = [BlockRange(0, 6), BlockRange(4, 18), BlockRange(18, 26), BlockRange(20, 40)]
    assert Cuts(26).uncovered(spans) == ()
    assert Cuts(26, 6).uncovered(spans) == (BlockRange(6, 18),)
    assert Cuts(26, 26).uncovered(spans) == (BlockRange(0, 26),)


@pytest.mark.parametrize(
    ("granularity", "start", "end", "advice"),
    [
        (6, 2, 14, "cut at multiples of 6 blocks only, or its answers would be others: serve 6-12 or 0-18"),
        (6, 7, 11, "others: serve 6-12$"),
        (6, 20, 26, "serve 24-26 or 18-26"),
        (26, 0, 13, r"can only be served whole \(0-26\)"),
        (1, 20, 27, "the model has blocks 0-26"),
    ],
)
def test_the_nearest_spans_are_named(granularity: int, start: int, end: int, advice: str) -> None:
    fault = Cuts(26, granularity).fault(BlockRange(start, end))
    assert fault is not None
    assert re.search(advice, fault), fault
