"""Hostile peers: what no honest peer sends costs its own sessions, and no other peer anything."""

from array import array
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.route_search import RECOVERY_LIMIT_S
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.engine.interface import PAGE_POSITIONS
from node.identity import Identity
from node.links.base_link import LinkBroken
from node.links.inbound_link import InboundLink
from node.links.outbound_link import OutboundLink, SessionRefused
from node.stages.dials_for_others import PER_OPENER
from node.stages.local_id import local_id
from node.stages.session import CHECKED_AT_ONCE_BYTES
from node.stages.span import BEGIN_LIMIT_S, SHORT_IDLE_LIMIT_S
from node.testing.fake_engine import expected_tokens, fake_span_info
from node.testing.memory_links import LinkModel
from protocol.codec import encode_step_header
from protocol.framing import FrameType, encode_frame
from protocol.identity import BlockRange, PeerId, SessionId, job_id_of
from protocol.messages import FailureReason, Open, Opened, RefusalReason, Refused, Step
from protocol.tensors import DType, Tensor, tensor_from_tokens
from selector.task import BASELINE
from tests.support.job_peers import BLOCKS, Peer, Swarm, open_swarm
from tests.support.raw_coordinator import HIDDEN, POSITIONS, RawCoordinator, a_slice, hidden, raw_coordinator_at
from tests.unit.coordinator.test_jobs import PROMPT, all_free, right_tokens

VOCABULARY = 1000
REQUEST = JobRequest(model="fake", prompt=PROMPT, max_tokens=12)
NAN, INFINITY = float("nan"), float("inf")


@asynccontextmanager
async def under_attack(*spans: tuple[int, int]) -> AsyncIterator[tuple[Swarm, Peer, RawCoordinator]]:
    """Give a swarm, a coordinator, and a stranger at the peer of the middle span."""
    async with open_swarm() as swarm:
        for span in spans:
            await swarm.join(span)
        coordinator = await swarm.join()
        yield swarm, coordinator, await raw_coordinator_at(swarm, swarm.peers[len(spans) // 2])


def halves(bits: int, dtype: DType) -> Tensor:
    """Return a row of 16-bit numbers, the last of which is given."""
    return Tensor(dtype, (1, HIDDEN), bytes(2 * HIDDEN - 2) + bits.to_bytes(2, "little"))


def blocks(scale_bits: int) -> Tensor:
    """Return a row of int8 with a scale for all of them."""
    return Tensor(DType.BLOCK_INT8, (1, HIDDEN), scale_bits.to_bytes(2, "little") + b"\x01" * HIDDEN)


Case = tuple[Tensor, dict[str, object], str]
FIRST: dict[str, Case] = {
    "a token beyond the vocabulary": (tensor_from_tokens([5, VOCABULARY]), {}, "not below 1000"),
    "hidden states for tokens": (hidden(), {}, "takes token ids"),
    "a gap": (tensor_from_tokens([1]), {"position": 5}, "do not follow"),
    "rows beyond what is reserved": (tensor_from_tokens([1] * 8), {"position": POSITIONS - 7}, "rows up to"),
    "many draws": (tensor_from_tokens([1] * 40), {"draws": 40}, "40 tokens to draw"),
    "drafts from outside": (tensor_from_tokens([1, 2]), {"draws": 2, "drafts": (2,)}, "without drafts"),
}
MIDDLE: dict[str, Case] = {
    "f32 that is not a number": (hidden(1.0, NAN), {}, "not finite"),
    "f32 that is infinite": (hidden(-INFINITY), {}, "not finite"),
    "f32 whose square is infinite": (hidden(1e30), {}, "not finite, or beyond"),
    "f16 that is not a number": (halves(0x7E00, DType.FLOAT16), {}, "not finite"),
    "bf16 that is infinite": (halves(0xFF80, DType.BFLOAT16), {}, "not finite"),
    "a scale that is infinite": (blocks(0x7C00), {}, "not finite"),
    "a scale that is not a number": (blocks(0xFE01), {}, "not finite"),
    "another width": (hidden(width=HIDDEN + 1), {}, "hidden states of 32 elements"),
    "integers": (Tensor(DType.INT8, (1, HIDDEN), bytes(HIDDEN)), {}, "hidden states of 32 elements"),
    "tokens for hidden states": (tensor_from_tokens([1]), {}, "hidden states of 32 elements"),
    "a gap": (hidden(), {"position": 3}, "do not follow"),
    "a draft beyond the vocabulary": (hidden(rows=2), {"draws": 2, "drafts": (VOCABULARY,)}, "a draft is not below"),
    "many draws": (hidden(rows=9), {"draws": 9}, "9 tokens to draw"),
}
CASES: list[tuple[tuple[tuple[int, int], ...], str, Tensor, dict[str, object], str]] = [
    (((0, 9),), name, *case) for name, case in FIRST.items()
]
CASES += [(((0, 3), (3, 6), (6, 9)), name, *case) for name, case in MIDDLE.items()]


@pytest.mark.parametrize(("spans", "name", "tensor", "changes", "fault"), CASES, ids=lambda case: str(case)[:40])
async def test_invalid_rows_fail_session_and_are_charged_to_sender(
    virtual_clock: MockClock,
    spans: tuple[tuple[int, int], ...],
    name: str,
    tensor: Tensor,
    changes: dict[str, object],
    fault: str,
) -> None:
    async with under_attack(*spans) as (swarm, coordinator, stranger):
        async with coordinator.coordinator.submit(REQUEST) as events:
            for attempt in range(1, 4):
                session = await stranger.begin()
                await stranger.send(a_slice(session, tensor, **changes), tensor)  # type: ignore[arg-type]
                lost = await stranger.until_lost(attempt)
                assert lost.reason is FailureReason.ENGINE
                assert fault in lost.message
                assert lost.blamed == stranger.id
                await stranger.link.close(session)
            assert [event async for event in events][-1].token_ids == right_tokens(12)  # type: ignore[union-attr]
        statistics = stranger.victim.stages.peer_statistics()
        assert (statistics[stranger.id].opened, statistics[stranger.id].faults) == (3, 3)
        assert statistics[stranger.id].failed == {FailureReason.ENGINE: 3}
        assert statistics[coordinator.id].failed == {}
        assert not stranger.link.broken
        await all_free(swarm)


async def test_backoff_grows_for_sender_of_invalid_rows(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, coordinator, stranger):
        took_s = []
        for attempt in range(1, 9):
            began_s = trio.current_time()
            session = await stranger.begin()
            took_s.append(trio.current_time() - began_s)
            await stranger.send(a_slice(session, tensor_from_tokens([VOCABULARY])), tensor_from_tokens([VOCABULARY]))
            await stranger.until_lost(attempt)
            await stranger.link.close(session)
        assert took_s[0] < 0.1
        assert 1.5 < took_s[-1] < 2.5
        assert (await coordinator.run(REQUEST)).token_ids == right_tokens(12)
        assert (await coordinator.run(REQUEST)).timing.total_s < 1


async def test_large_rows_are_checked_piecewise_in_order(virtual_clock: MockClock) -> None:
    rows = CHECKED_AT_ONCE_BYTES // (4 * HIDDEN) + 100
    async with open_swarm() as swarm:
        await swarm.join((0, 3))
        victim = await swarm.join((3, 6), kv_positions=1 << 16, max_positions=1 << 16)
        stranger = await raw_coordinator_at(swarm, victim)
        session = await stranger.begin(rows + 10)
        bad = hidden(rows=rows)
        data = bytearray(bad.data)
        data[-4:] = array("f", [NAN]).tobytes()
        await stranger.send(a_slice(session, bad), Tensor(bad.dtype, bad.shape, bytes(data)))
        await stranger.send(a_slice(session, hidden(), position=rows), hidden())
        lost = await stranger.until_lost()
        assert "not finite" in lost.message
        assert victim.engines[0].statistics().steps == 0


async def test_rows_beyond_reservation_end_session_then_link(virtual_clock: MockClock) -> None:
    async with under_attack((0, 3), (3, 6), (6, 9)) as (_, _coordinator, stranger):
        stranger.victim.engines[0]._step_s = 100.0  # so that rows wait
        tensor = hidden(rows=POSITIONS)
        for attempt in (1, 2):
            session = await stranger.begin()
            for _ in range(2):
                if not stranger.link.broken:
                    await stranger.send(a_slice(session, tensor), tensor)
            await stranger.until_lost(attempt)
        assert "beside 64 that wait" in stranger.lost[0].message
        with trio.fail_after(2):
            while not stranger.link.broken:
                await trio.sleep(0.01)
        assert stranger.victim.stages.peer_statistics()[stranger.id].bytes == 0


async def test_rows_before_begin_are_bounded_by_reservation(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        victim = await swarm.join((3, 6))
        opener, sender = await raw_coordinator_at(swarm, victim), await raw_coordinator_at(swarm, victim)
        opening = opener.opening()
        session = opening.session
        await opener.open_with(replace(opening, upstream=(sender.id,)))
        tensor = hidden(rows=POSITIONS)
        await sender.send(a_slice(session, tensor), tensor)
        await trio.sleep(0.1)
        assert victim.stages.peer_statistics()[opener.id].bytes == POSITIONS * 4 * HIDDEN
        await sender.send(a_slice(session, hidden()), hidden())
        lost = await opener.until_lost()
        assert lost.blamed == sender.id
        assert victim.held()[0] == 0


@dataclass
class Framed:
    """A victim with an honest stage before it on a route that a stranger has opened."""

    opener: RawCoordinator
    sender: RawCoordinator
    session: SessionId

    def faults(self) -> tuple[int, int]:
        """Return how many faults the victim has put down to the opener, and to the sender."""
        found = self.opener.victim.stages.peer_statistics()
        return tuple(found[peer].faults if peer in found else 0 for peer in (self.opener.id, self.sender.id))  # type: ignore[return-value]


@asynccontextmanager
async def framed(span: tuple[int, int] = (3, 6)) -> AsyncIterator[Framed]:
    async with open_swarm() as swarm:
        victim = await swarm.join(span)
        opener, sender = await raw_coordinator_at(swarm, victim), await raw_coordinator_at(swarm, victim)
        yield Framed(opener, sender, opener.opening().session)


@pytest.mark.parametrize(
    ("span", "tensor", "position", "is_begun"),
    [
        ((3, 6), hidden(rows=8), POSITIONS - 7, True),
        ((3, 6), hidden(), 3, True),
        ((3, 6), hidden(width=HIDDEN + 1), 0, True),
        ((3, 6), hidden(rows=POSITIONS), 0, False),
    ],
    ids=["beyond its positions", "a gap", "another width", "twice all its positions"],
)
async def test_opener_is_charged_for_rows_it_makes_others_send(
    virtual_clock: MockClock, span: tuple[int, int], tensor: Tensor, position: int, is_begun: bool
) -> None:
    async with framed(span) as each:
        honest = await each.sender.begin()
        for attempt in range(1, 4):
            session = await each.opener.begin(upstream=(each.sender.id,), is_begun=is_begun)
            for _ in range(1 if is_begun else 2):
                await each.sender.send(a_slice(session, tensor, position), tensor)
            lost = await each.opener.until_lost(attempt)
            assert lost.blamed == each.sender.id, "the opener may avoid it"
        assert each.faults() == (3, 0)
        assert not each.sender.link.broken
        await trio.sleep(1)
        assert local_id(honest, each.sender.id) in each.opener.victim.stages.spans()[0].sessions


@pytest.mark.parametrize(
    ("span", "tensor", "changes"),
    [((0, 9), tensor_from_tokens([VOCABULARY]), {}), ((3, 6), hidden(rows=2), {"draws": 2, "drafts": (VOCABULARY,)})],
    ids=["token", "draft"],
)
async def test_nobody_is_charged_for_token_ids_of_a_lying_stage_or_another_model(
    virtual_clock: MockClock, span: tuple[int, int], tensor: Tensor, changes: dict[str, Any]
) -> None:
    async with framed(span) as each:
        session = await each.opener.begin(upstream=(each.sender.id,))
        await each.sender.send(a_slice(session, tensor, **changes), tensor)
        assert (await each.opener.until_lost()).blamed == each.sender.id
        assert each.faults() == (0, 0)


async def test_sender_is_charged_for_rows_no_honest_stage_sends(virtual_clock: MockClock) -> None:
    async with framed() as each:
        session = await each.opener.begin(upstream=(each.sender.id,))
        await each.sender.send(a_slice(session, hidden(NAN)), hidden(NAN))
        await each.opener.until_lost()
        assert each.faults() == (0, 1)


async def test_rows_go_only_to_session_that_admitted_them(virtual_clock: MockClock) -> None:
    """While they come, it is closed and opened anew, with other positions."""
    async with under_attack((0, 3), (3, 6), (6, 9)) as (swarm, _coordinator, stranger):
        opener = await raw_coordinator_at(swarm, stranger.victim)
        (span,) = stranger.victim.stages.spans()
        opening = replace(opener.opening(), upstream=(stranger.id,))
        session = opening.session
        await opener.open_with(opening)
        step = Step(slices=(a_slice(session, hidden(rows=8)),), tensor=hidden(rows=8))
        header, data = encode_step_header(step), step.tensor.data
        first = encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header, data[:64])
        await stranger.send_raw(first)
        assert span.sessions[local_id(session, opener.id)].held_rows == 8
        await opener.link.close(session)
        await opener.open_with(replace(opening, positions=4))
        await stranger.send_raw(encode_frame(FrameType.CHUNK, data[64:]))
        assert span.sessions[local_id(session, opener.id)].held_rows == 0
        assert span.sessions[local_id(session, opener.id)].state.counters.bytes_in == 0
        assert not stranger.link.broken


async def test_stage_cannot_take_the_sessions_of_others_on_its_route(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the job id before they do, whose penalty for this coordinator makes them wait."""
    async with open_swarm() as swarm:
        first, second, coordinator = await swarm.join((0, 4)), await swarm.join((4, 9)), await swarm.join()
        accomplice = await raw_coordinator_at(swarm, second)
        second.stages._records.fault(coordinator.id, trio.current_time(), reason="rows of its other stage")
        open_session = first.stages.open

        async def open_others_first(message: Open, link: InboundLink) -> Opened | Refused:
            following = SessionId(message.session.job, 1)
            await accomplice.open_with(replace(accomplice.opening(), session=following, upstream=(first.id,)))
            return await open_session(message, link)

        monkeypatch.setattr(first.stages, "open", open_others_first)
        result = await coordinator.run(REQUEST)
        assert (result.token_ids, result.replays) == (right_tokens(12), 0)
        assert "another coordinator's" in (await accomplice.until_lost()).message


@pytest.mark.parametrize("stage", [0, 5])
async def test_job_id_opens_sessions_for_its_coordinator_only(virtual_clock: MockClock, stage: int) -> None:
    """Rows that a stage sends for another's session of the job could pass for those of its coordinator's."""
    async with under_attack((0, 9)) as (swarm, _coordinator, owner):
        stranger = await raw_coordinator_at(swarm, owner.victim)
        session = SessionId(job_id_of(owner.id, bytes(8)), 0)
        stolen = replace(stranger.opening(), session=session._replace(stage=stage))
        await stranger.open_with(stolen)
        await owner.open_with(replace(owner.opening(), session=session))
        await stranger.until_lost()
        await stranger.link.close(stolen.session)
        with pytest.raises(SessionRefused, match="the job is another's"):
            await stranger.open_with(stolen)
        assert [each.opened_by.peer for each in owner.victim.stages.spans()[0].sessions.values()] == [owner.id]
        await owner.open_with(replace(owner.opening(), session=session._replace(stage=1)))
        assert not owner.lost


async def test_opens_do_not_have_a_stage_dial_peers_without_end(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor tell what it found at the addresses that these peers claim."""
    async with under_attack((0, 3)) as (swarm, _coordinator, stranger):
        dialled: Counter[PeerId] = Counter()
        link_pool = stranger.victim.stages.link_pool

        async def link_to(peer: PeerId) -> OutboundLink:
            dialled[peer] += 1
            raise LinkBroken(peer, "10.0.0.1:22 does not speak libp2p")

        made_up = [Identity(swarm.rng.randbytes(32)).peer_id for _ in range(100)]
        with monkeypatch.context() as patch:
            patch.setattr(link_pool, "link_to", link_to)
            for peer in (*[made_up[0]] * 50, *made_up):
                with pytest.raises(SessionRefused) as refused:
                    await stranger.open_with(replace(stranger.opening(), downstream=peer))
                assert str(refused.value) == f"cannot reach {peer}"
        assert dialled[made_up[0]] <= 2
        assert sum(dialled.values()) <= PER_OPENER.burst + 1
        honest = await swarm.join((3, 9))
        await swarm.settle()
        await stranger.open_with(replace(stranger.opening(), downstream=honest.id))


async def test_session_that_does_not_begin_expires(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, _coordinator, stranger):
        await stranger.open()
        await trio.sleep(BEGIN_LIMIT_S - 1)
        assert stranger.victim.held()[0] == 1
        await trio.sleep(3)
        assert stranger.victim.held() == (0, 0)
        assert [lost.reason for lost in stranger.lost] == [FailureReason.EXPIRED]
        assert not stranger.link.broken


async def test_continuing_unbegun_session_does_not_extend_its_deadline(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, _coordinator, stranger):
        opening = stranger.opening()
        await stranger.open_with(opening)
        for _ in range(2):
            await trio.sleep(BEGIN_LIMIT_S * 0.45)
            opening = replace(stranger.opening(), continues=opening.session)
            await stranger.open_with(opening)
        await trio.sleep(BEGIN_LIMIT_S * 0.1 + 3)
        assert stranger.victim.held() == (0, 0)


def test_short_idle_limit_exceeds_recovery_limit() -> None:
    assert SHORT_IDLE_LIMIT_S > RECOVERY_LIMIT_S


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "being opened"])
async def test_session_descriptions_are_bounded_and_leave_room_for_others(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    monkeypatch.setattr("node.stages.session_admission.DESCRIPTION_BYTES", 1 << 20)
    async with under_attack((0, 9)) as (_, coordinator, stranger):
        if not is_open:
            stages = stranger.victim.stages
            for _ in range(99):
                stages._records.fault(stranger.id, trio.current_time())
        names = (BASELINE.name, *(f"{number:0256d}" for number in range(127)))
        outcomes: list[str] = []

        async def open_one() -> None:
            try:
                await stranger.open_with(replace(stranger.opening(), methods=names))
                outcomes.append("opened")
            except SessionRefused as error:
                is_as_expected = error.reason is RefusalReason.FULL and "no memory to describe" in str(error)
                outcomes.append("refused" if is_as_expected else str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(open_one)
                if is_open:
                    await trio.sleep(0.1)
            await trio.sleep(0.1)
            assert len(outcomes) == 40 if is_open else set(outcomes) == {"refused"}
            assert 40 - outcomes.count("refused") <= (1 << 20) // (127 * 256)
            assert (await coordinator.run(REQUEST)).token_ids == right_tokens(12)
            assert (await stranger.victim.run(REQUEST)).token_ids == right_tokens(12)
        assert "opened" in outcomes
        await trio.sleep(BEGIN_LIMIT_S + 2)
        await open_one()
        assert outcomes[-1] == "opened", "what has ended is not counted"


async def test_admission_leaves_kv_memory_for_own_jobs_and_other_peers(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, coordinator, stranger):
        for _ in range(8):  # while memory is plenty nobody is refused
            await stranger.begin(1024)
        refused: SessionRefused | None = None
        while refused is None:
            try:
                await stranger.begin(1024)
            except SessionRefused as error:
                refused = error
        assert refused.reason is RefusalReason.FULL
        assert (await stranger.victim.run(REQUEST)).token_ids == right_tokens(12)
        assert (await coordinator.run(REQUEST)).token_ids == right_tokens(12)
        # Whoever wants more than there is makes the hoarder's idle sessions end sooner.
        large = JobRequest(model="fake", prompt=PROMPT, max_tokens=3500, ignore_eos=True)
        began_s = trio.current_time()
        while True:
            try:
                async with coordinator.coordinator.submit(large):
                    break
            except JobError as error:
                if error.code is not JobErrorCode.FULL:
                    raise
                await trio.sleep(10)
        assert SHORT_IDLE_LIMIT_S - 5 < trio.current_time() - began_s < SHORT_IDLE_LIMIT_S + 15


async def test_memory_of_session_continued_as_smaller_one_still_counts(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, _coordinator, stranger):
        for _ in range(3):
            former = await stranger.begin(1024)
            await stranger.open_with(replace(stranger.opening(32), continues=former))
        statistics = stranger.victim.stages.peer_statistics()[stranger.id]
        (span,) = stranger.victim.stages.spans()
        assert (statistics.sessions, statistics.positions) == (3, 3 * 1024)
        assert span.held_pages() == {stranger.id: 3 * 1024 // PAGE_POSITIONS}


async def test_first_peer_leaves_reserve_to_own_jobs(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        victim = await swarm.join((0, 9), kv_positions=1024, max_positions=1024)
        stranger = await raw_coordinator_at(swarm, victim)
        with pytest.raises(SessionRefused) as refused:
            await stranger.begin(1024)
        assert refused.value.reason is RefusalReason.FULL
        await stranger.begin(1024 * 7 // 8)
        assert (await victim.run(REQUEST)).token_ids == right_tokens(12)


async def test_session_counts_for_the_memory_that_its_keys_and_values_take(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        victim = await swarm.join((0, 9), kv_positions=1024, kv_shares={"auto": 0.5})
        stranger = await raw_coordinator_at(swarm, victim)
        for _ in range(2):  # a half and another are more than a peer may hold, but they take a quarter each
            await stranger.begin(512)
            await trio.sleep(0.5)
        (span,) = victim.stages.spans()
        assert span.held_pages() == {stranger.id: 512 // PAGE_POSITIONS}


async def test_outputs_queued_on_slow_link_leave_in_order(virtual_clock: MockClock) -> None:
    """Prompts of several megabytes over links that take a second for each."""
    slow = LinkModel(latency_s=0.01, bandwidth=2e6)
    async with open_swarm(link=slow) as swarm:
        for span in ((0, 3), (3, 6), (6, 9)):
            await swarm.join(span, hidden_size=2048, kv_positions=1 << 14)
        coordinator = await swarm.join()
        await swarm.settle()
        prompt = tuple(range(900))
        for count in (2, 3):
            request = JobRequest(model="fake", prompt_tokens=prompt, max_tokens=count)
            info = fake_span_info(BlockRange(0, BLOCKS), block_count=BLOCKS, hidden_size=2048)
            assert (await coordinator.run(request)).token_ids == expected_tokens(info, prompt, count)
        await all_free(swarm)
