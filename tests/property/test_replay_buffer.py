"""Laws of the replay buffer, and of the plan of where each stage resumes on another route."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.stages.replay_buffer import ReplayBuffer, ReplayMemory, ResumePoint, plan_resume, replay_bytes_of
from protocol.tensors import DType, Tensor

ROW_BYTES = 8


def rows_of(values: list[int]) -> Tensor:
    return Tensor(DType.FLOAT32, (len(values), 2), b"".join(value.to_bytes(ROW_BYTES, "big") for value in values))


@st.composite
def resume_points(draw: st.DrawFn) -> ResumePoint:
    positions = draw(st.integers(0, 40))
    return ResumePoint(positions, draw(st.integers(0, positions)))


@given(st.lists(resume_points(), min_size=1, max_size=8), st.integers(0, 40))
def test_plan_resume_feeds_every_row_and_computes_only_missing_ones(stages: list[ResumePoint], last: int) -> None:
    starts = plan_resume(stages, last)
    for stage, start, following in zip(stages, starts, [*starts[1:], last], strict=True):
        assert start <= min(stage.positions, last)  # nothing is missing
        assert following >= start or stage.replay_from <= following  # the next one gets all rows from its start on
    if all(stage.replay_from == 0 for stage in stages):
        assert starts == [min(stage.positions, last) for stage in stages]  # nobody computes what it holds


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 1 << 60), min_size=1, max_size=9)), max_size=30),
    st.integers(0, 40),
)
def test_replay_buffer_reads_back_last_writes_within_its_memory(
    writes: list[tuple[int, list[int]]], limit_rows: int
) -> None:
    memory = ReplayMemory(limit_rows * ROW_BYTES)
    buffer = ReplayBuffer(memory)
    sent: dict[int, int] = {}
    for gap, values in writes:
        position = min(gap, len(sent))  # never beyond what there is, at any place before
        sent = {place: value for place, value in sent.items() if place < position}
        sent |= dict(enumerate(values, position))
        buffer.write(position, rows_of(values))
        assert buffer.end == len(sent)
        pieces = range(buffer.start, buffer.end, 4)
        got = b"".join(buffer.read(start, min(start + 4, buffer.end)).data for start in pieces)
        assert got == rows_of([sent[place] for place in range(buffer.start, buffer.end)]).data
        assert len(got) <= limit_rows * ROW_BYTES
        with pytest.raises(ValueError, match="not in the replay buffer"):
            buffer.read(buffer.start, buffer.end + 1)
    buffer.drop()
    assert memory.take(limit_rows * ROW_BYTES)  # all was returned


@given(st.integers(0, 1 << 50))
def test_replay_memory_is_small_part_of_memory(memory_bytes: int) -> None:
    assert 0 <= replay_bytes_of(memory_bytes) <= min(512 << 20, memory_bytes // 16)
