"""Laws of what stages keep of their outputs, and of where each of them starts on another route."""

from hypothesis import given
from hypothesis import strategies as st

from node.stages.replay_buffer import Budget, Held, ReplayBuffer, kept_bytes_of, starts_of
from protocol.tensors import DType, Tensor

ROW_BYTES = 8


def rows_of(values: list[int]) -> Tensor:
    return Tensor(DType.FLOAT32, (len(values), 2), b"".join(value.to_bytes(ROW_BYTES, "big") for value in values))


@st.composite
def held(draw: st.DrawFn) -> Held:
    positions = draw(st.integers(0, 40))
    return Held(positions, draw(st.integers(0, positions)))


@given(st.lists(held(), min_size=1, max_size=8), st.integers(0, 40))
def test_every_stage_gets_each_row_that_it_computes_and_computes_what_it_does_not_hold(
    stages: list[Held], last: int
) -> None:
    starts = starts_of(stages, last)
    for stage, start, following in zip(stages, starts, [*starts[1:], last], strict=True):
        assert start <= min(stage.positions, last)  # nothing is missing
        assert following >= start or stage.kept_from <= following  # the next one gets all rows from its start on
    if all(stage.kept_from == 0 for stage in stages):
        assert starts == [min(stage.positions, last) for stage in stages]  # nobody computes what it holds


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 1 << 60), min_size=1, max_size=9)), max_size=30),
    st.integers(0, 40),
)
def test_what_is_kept_is_what_was_sent_last(writes: list[tuple[int, list[int]]], limit_rows: int) -> None:
    budget = Budget(limit_rows * ROW_BYTES)
    kept = ReplayBuffer(budget)
    sent: dict[int, int] = {}
    for gap, values in writes:
        position = min(gap, len(sent))  # never beyond what there is, at any place before
        sent = {place: value for place, value in sent.items() if place < position}
        sent |= dict(enumerate(values, position))
        kept.keep(position, rows_of(values))
        assert kept.end == len(sent)
        got = (
            b"".join(tensor.data for _, tensor in kept.pieces(kept.start, kept.end, 4))
            if kept.end > kept.start
            else b""
        )
        assert got == rows_of([sent[place] for place in range(kept.start, kept.end)]).data
        assert len(got) <= limit_rows * ROW_BYTES
    kept.drop()
    assert budget.take(limit_rows * ROW_BYTES)  # all was given back


@given(st.integers(0, 1 << 50))
def test_what_is_kept_is_a_small_part_of_the_memory_whatever_there_is(memory_bytes: int) -> None:
    assert 0 <= kept_bytes_of(memory_bytes) <= min(512 << 20, memory_bytes // 16)
