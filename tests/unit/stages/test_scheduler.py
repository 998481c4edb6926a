"""Who goes into the next step, and when the policy changes."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.stages.scheduler import (
    BACKGROUND_SHARE,
    HOLD_S,
    MAX_PAUSE_S,
    MIN_PREFILL_ROWS,
    PREFILL_ROWS,
    STALL_BOUND_S,
    STATIC_MAX_WAIT_S,
    Batching,
    PolicyController,
    Scheduler,
    StagePolicy,
    Work,
)
from protocol.identity import JobId, PeerId, SessionId
from protocol.limits import MAX_SLICES
from protocol.messages import Slice
from protocol.tensors import tensor_from_tokens

ALICE, BOB = PeerId("alice"), PeerId("bob")


def session(number: int) -> SessionId:
    return SessionId(JobId(f"{number:032x}"), 0)


def work(
    number: int, rows: int = 1, draws: int = 1, *, at_s: float = 0.0, of: PeerId = ALICE, first: int = 0
) -> Work[str]:
    part = Slice(session=session(number), position=first, rows=rows, draws=draws)
    tensor = tensor_from_tokens(range(first, first + rows))
    return Work(part, tensor, coordinator=of, origin="link", payload_bytes=4 * rows, arrived_s=at_s)


def scheduler(batching: Batching, *works: Work[str], step_rows: int = 64) -> Scheduler[str]:
    made: Scheduler[str] = Scheduler(StagePolicy(batching, step_rows))
    for each in works:
        made.add(each)
    return made


def numbers(batch: Iterable[Work[str]]) -> list[int]:
    return [int(each.session.job, 16) for each in batch]


def decoding(made: Scheduler[str], *sessions: int) -> None:
    """Have sessions take a step of decoding, after which they are known to decode."""
    for number in sessions:
        made.add(work(number))
    made.next_batch(0)


def test_unbatched_steps_go_by_arrival() -> None:
    made = scheduler(Batching.ONE, work(1, 300, at_s=1), work(2, at_s=0), work(1, 1, at_s=2, first=300))
    assert [numbers(made.next_batch(9)) for _ in range(4)] == [[2], [1], [1], []]


def test_rows_of_a_session_keep_their_order() -> None:
    made = scheduler(Batching.CONTINUOUS, work(1, 5, 0), work(1, 5, 1, first=5), work(2))
    first, second = made.next_batch(0), made.next_batch(0)
    assert [(each.part.position, each.rows) for each in first if each.session == session(1)] == [(0, 5)]
    assert [(each.part.position, each.rows) for each in second] == [(5, 5)]


def test_continuous_batching_decodes_together() -> None:
    made = scheduler(Batching.CONTINUOUS, *(work(number) for number in range(8)))
    assert numbers(made.next_batch(0)) == list(range(8))
    assert made.next_batch(0) == []
    assert made.rows == 0


def test_chunked_prefill_fits_rest_of_row_budget() -> None:
    made = scheduler(Batching.CONTINUOUS)
    decoding(made, 1, 2, 3)
    made.add(work(9, 200))
    taken = []
    for _ in range(3):
        for number in (1, 2, 3):
            made.add(work(number))
        batch = made.next_batch(0)
        assert sum(each.rows for each in batch) == 64
        taken += [each for each in batch if each.session == session(9)]
    assert [(each.part.position, each.rows, each.part.draws) for each in taken] == [
        (0, 61, 0),
        (61, 61, 0),
        (122, 61, 0),
    ]
    # Also while they are at another stage; and the last row, after which a token is drawn, is in the last piece.
    [rest] = made.next_batch(0)
    assert (rest.part.position, rest.rows, rest.part.draws) == (183, 17, 1)
    whole = [token for each in [*taken, rest] for token in bytes(each.tensor.data)]
    assert bytes(whole) == bytes(tensor_from_tokens(range(200)).data)
    assert sum(each.payload_bytes for each in [*taken, rest]) == 800


def test_prefill_alone_is_cut_for_who_comes_meanwhile() -> None:
    made = scheduler(Batching.CONTINUOUS, work(1, 2000))
    assert [each.rows for each in made.next_batch(0)] == [PREFILL_ROWS]
    made.add(work(2, 10, at_s=1.0, of=BOB))
    assert numbers(made.next_batch(1)) == [1], "the newcomer is level with who has had one step"
    assert numbers(made.next_batch(2)) == [2, 1]


@pytest.mark.parametrize("batching", Batching)
def test_scored_rows_are_cut(batching: Batching) -> None:
    made = scheduler(batching, replace(work(1, 2 * PREFILL_ROWS + 9), is_scored=True))
    batches = [made.next_batch(0) for _ in range(3)]
    assert [[(each.part.position, each.rows, each.part.draws) for each in batch] for batch in batches] == [
        [(0, PREFILL_ROWS, 0)],
        [(PREFILL_ROWS, PREFILL_ROWS, 0)],
        [(2 * PREFILL_ROWS, 9, 1)],
    ]
    assert not made.rows


def test_short_prefills_share_step_up_to_bound() -> None:
    made = scheduler(Batching.CONTINUOUS, *(work(number, 200) for number in range(9)))
    rows = sum(each.rows for each in made.next_batch(0))
    assert rows == PREFILL_ROWS


def test_prefill_is_not_starved_by_decoding() -> None:
    made = scheduler(Batching.CONTINUOUS, step_rows=64)
    decoding(made, *range(100))
    made.add(work(900, 500))
    for number in range(100):
        made.add(work(number))
    rows = {each.session: each.rows for each in made.next_batch(0)}
    assert rows[session(900)] == MIN_PREFILL_ROWS


def test_prefill_is_fair_between_coordinators() -> None:
    made = scheduler(Batching.CONTINUOUS)
    decoding(made, 1)
    for number in range(10, 30):
        made.add(work(number, 64, of=ALICE))
    made.add(work(99, 64, of=BOB, at_s=1))
    order: list[int] = []
    for _ in range(4):
        order += numbers(made.next_batch(2))
    assert 99 in order[:4]


def test_short_prompt_waits_for_no_long_one_of_its_coordinator() -> None:
    made = scheduler(Batching.CONTINUOUS)
    decoding(made, 1)
    made.add(work(2, 8000, at_s=1))
    made.next_batch(1)
    made.add(work(3, 10, at_s=2))
    batch = made.next_batch(2)
    assert list(zip(numbers(batch), [each.rows for each in batch], strict=True)) == [(3, 10), (2, 54)]


def test_long_prompt_is_not_starved_by_short_ones_of_its_coordinator() -> None:
    made = scheduler(Batching.CONTINUOUS)
    decoding(made, 1)
    made.add(work(2, 640, at_s=1))
    rows = 0
    for step in range(4 * 640 // 64 + 4):
        for number in (1000 + step, 2000 + step):  # more than there is room for
            made.add(work(number, 48, at_s=2 + step))
        rows += sum(each.rows for each in made.next_batch(2 + step) if each.session == session(2))
    assert rows == 640


def test_first_of_two_long_prompts_is_not_delayed() -> None:
    made = scheduler(Batching.CONTINUOUS)
    decoding(made, 1)
    made.add(work(2, 320, at_s=1))
    order = numbers(made.next_batch(1))
    made.add(work(3, 320, at_s=2))
    for _ in range(9):
        order += numbers(made.next_batch(2))
    assert order == [2] * 5 + [3] * 5


def test_static_batch_admits_no_session_until_it_has_ended() -> None:
    made = scheduler(Batching.STATIC, work(1), work(2))
    assert numbers(made.next_batch(0)) == [1, 2]
    made.add(work(3, at_s=0.1))
    assert made.next_batch(0.1) == []
    made.add(work(1, at_s=0.2))
    assert numbers(made.next_batch(0.2)) == [1]
    made.remove(session(1))
    assert made.next_batch(0.3) == []
    made.remove(session(2))
    assert numbers(made.next_batch(0.4)) == [3]


def test_stuck_static_batch_times_out() -> None:
    made = scheduler(Batching.STATIC, work(1))
    made.next_batch(5)
    made.add(work(2, at_s=6))
    assert made.next_chance_s(5.5) == 5 + STATIC_MAX_WAIT_S
    assert numbers(made.next_batch(5 + STATIC_MAX_WAIT_S)) == [2]


def test_removed_session_is_forgotten() -> None:
    made = scheduler(Batching.CONTINUOUS, work(1), work(2, 500))
    made.remove(session(1))
    made.remove(session(3))
    assert numbers(made.next_batch(0)) == [2]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 700), st.booleans()), max_size=40),
    st.sampled_from(Batching),
    st.sampled_from([32, 64, 512]),
)
def test_every_row_is_computed_once_and_in_order(
    arrivals: list[tuple[int, int, bool]], batching: Batching, step_rows: int
) -> None:
    made = scheduler(batching, step_rows=step_rows)
    lengths = dict.fromkeys(range(10), 0)
    for at_s, (number, rows, is_last) in enumerate(arrivals):
        made.add(work(number, rows, int(is_last), first=lengths[number], at_s=at_s, of=ALICE if number % 2 else BOB))
        lengths[number] += rows
    computed = dict.fromkeys(range(10), 0)
    now_s = 0.0
    while made.rows:
        now_s += 2 * STATIC_MAX_WAIT_S
        batch = made.next_batch(now_s)
        assert 0 < len(batch) <= MAX_SLICES
        assert len({each.session for each in batch}) == len(batch)
        for each in batch:
            number = int(each.session.job, 16)
            assert each.part.position == computed[number]
            assert each.tensor.rows == each.rows
            computed[number] += each.rows
    assert computed == lengths
    assert made.next_batch(now_s) == []


# The policy


def test_row_budget_follows_row_cost_with_hysteresis() -> None:
    controller = PolicyController()
    slow_s = STALL_BOUND_S / 40  # 32 rows fit the bound, 64 do not
    assert controller.observe(100, 100 * slow_s, 0.0).step_rows == 128
    assert controller.observe(100, 100 * slow_s, HOLD_S - 0.1).step_rows == 128
    assert controller.observe(100, 100 * slow_s, HOLD_S).step_rows == 32
    # A short spell of speed changes nothing.
    for at_s in range(40, 43):
        assert controller.observe(100, slow_s / 100, at_s).step_rows == 32
    for at_s in range(43, 143):
        controller.observe(100, slow_s / 100, at_s)
    assert controller.policy.step_rows == 512


@pytest.mark.parametrize("batching", Batching)
def test_policy_fixed_by_operator_stays(batching: Batching) -> None:
    controller = PolicyController(batching=batching, step_rows=256)
    for at_s in range(100):
        assert controller.observe(100, 100.0, at_s) == StagePolicy(batching, 256)


def background(number: int, rows: int = 1, draws: int = 1) -> Work[str]:
    return replace(work(number, rows, draws), is_background=True)


@pytest.mark.parametrize("batching", Batching)
def test_measurements_get_a_share_of_the_time_while_there_are_users(batching: Batching) -> None:
    made = scheduler(batching, work(1), background(2))
    now_s, of_measurements_s = 0.0, 0.0
    while now_s < 100:
        batch = made.next_batch(now_s)
        if not batch:
            chance_s = made.next_chance_s(now_s)
            now_s = now_s + 0.2 if chance_s is None else chance_s  # the user's next row has come
        for number in numbers(batch):
            made.add(work(number) if number == 1 else background(number))
        took_s = 0.1 if batch else 0.0
        of_measurements_s += took_s if 2 in numbers(batch) else 0.0
        now_s += took_s
    assert 0.5 * BACKGROUND_SHARE * 100 < of_measurements_s < 1.2 * BACKGROUND_SHARE * 100


def test_measurements_alone_do_not_wait() -> None:
    made = scheduler(Batching.CONTINUOUS, work(1), background(2))
    assert numbers(made.next_batch(0)) == [1, 2]
    made.add(background(2))
    assert numbers(made.next_batch(1)) == []
    assert made.next_chance_s(1) == pytest.approx(10)
    made.remove(session(1))
    assert numbers(made.next_batch(2)) == [2]
    assert made.next_chance_s(3) is None


def test_prompt_of_a_measurement_is_cut_for_a_user_who_does_not_decode_yet() -> None:
    made = scheduler(Batching.CONTINUOUS, work(1, 64, 0), background(2, 300, 0), step_rows=64)
    assert numbers(made.next_batch(0)) == [1]
    assert [each.rows for each in made.next_batch(1)] == [64]


def test_prompt_of_a_measurement_is_cut_for_users_who_may_come() -> None:
    made = scheduler(Batching.CONTINUOUS, background(1, 150), background(2, 50), step_rows=64)
    batches = [made.next_batch(0) for _ in range(5)]
    assert [sum(each.rows for each in batch) for batch in batches] == [64, 64, 64, 8, 0]


def test_pause_of_measurements_is_bounded() -> None:
    made = scheduler(Batching.CONTINUOUS, background(2, 64, 0))
    assert numbers(made.next_batch(0)) == [2]
    for number in (1, 2):  # a user comes during a step that is slow beyond expectation
        made.add(background(2) if number == 2 else work(1))
    assert numbers(made.next_batch(60)) == [1]
    assert made.next_chance_s(60) == pytest.approx(60 + MAX_PAUSE_S)
    assert numbers(made.next_batch(60 + MAX_PAUSE_S)) == [2]
