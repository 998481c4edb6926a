"""A peer that says what no honest one would: it costs its own sessions, and nobody else anything."""

import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.failover import RECOVERY_LIMIT_S
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.engine.interface import PAGE_POSITIONS
from node.links.buffers import PARTIAL_BYTES, LinkBuffers
from node.links.inbound_link import InboundLink
from node.links.outbound_link import OutboundLink, SessionLost, SessionRefused
from node.stages.fair_share import may_take
from node.stages.session import CHECKED_AT_ONCE_BYTES
from node.stages.span import BEGIN_LIMIT_S, SHORT_IDLE_LIMIT_S
from node.testing.fake_engine import expected_tokens, fake_span_info
from node.testing.memory_links import LinkModel
from protocol.codec import encode_step_header
from protocol.framing import FrameType, encode_frame
from protocol.identity import BlockRange, JobId, PeerId, SessionId, peer_id_from_public_key
from protocol.messages import Ballot, Begin, FailureReason, Open, Opened, RefusalReason, Sampling, Slice, Step
from protocol.tensors import DType, Tensor, tensor_from_tokens
from selector.task import BASELINE
from tests.support.job_peers import BLOCKS, Peer, Swarm, open_swarm
from tests.unit.coordinator.test_jobs import PROMPT, all_free, right_tokens

HIDDEN, VOCABULARY, POSITIONS = 32, 1000, 64
REQUEST = JobRequest(model="fake", prompt=PROMPT, max_tokens=12)
NAN, INFINITY = float("nan"), float("inf")


@dataclass
class Stranger:
    """Opens sessions at a victim as it likes."""

    peer: Peer
    victim: Peer
    link: OutboundLink
    lost: list[SessionLost] = field(default_factory=list)
    opened: int = 0

    @property
    def id(self) -> PeerId:
        return self.peer.id

    def opening(self, positions: int = POSITIONS) -> Open:
        """Return what opens a session of the victim's whole span."""
        info = self.victim.engines[0].info
        self.opened += 1
        job = JobId(f"{random.Random(self.id).getrandbits(96):024x}{self.opened:08x}")
        last = info.is_last
        return Open(
            session=SessionId(job, 0),
            model=info.model,
            blocks=info.blocks,
            methods=(BASELINE.name,),
            positions=positions,
            downstream=None if last else self.id,
            sampling=Sampling(max_tokens=positions) if last else None,
        )

    async def open(self, positions: int = POSITIONS) -> SessionId:
        """Open a session without beginning it."""
        return await self.begin(positions, is_begun=False)

    async def open_with(self, opening: Open) -> Opened:
        self.link.watch(opening.session, self.lost.append)
        return await self.link.open(opening)

    async def begin(
        self, positions: int = POSITIONS, *, upstream: tuple[PeerId, ...] = (), is_begun: bool = True
    ) -> SessionId:
        """Open a session and begin it, unless it is not to be."""
        opening = replace(self.opening(positions), upstream=upstream)
        opened = await self.open_with(opening)
        if not is_begun:
            return opening.session
        ballots = (Ballot(self.victim.id, (opened.votes[BASELINE.name],)), Ballot(self.id, (0.0,)))
        self.link.begin(Begin(session=opening.session, method=BASELINE.name, ballots=ballots))
        return opening.session

    async def send(self, part: Slice, tensor: Tensor) -> None:
        await self.link.send_step(Step(slices=(part,), tensor=tensor))

    async def say(self, frame: bytes) -> None:
        """Say something past all that a link checks, and wait until it is heard."""
        await self.link._stream.send_all(frame)
        await trio.sleep(0.5)

    async def until_lost(self, count: int = 1) -> SessionLost:
        with trio.fail_after(5):
            while len(self.lost) < count:
                await trio.sleep(0.01)
        return self.lost[count - 1]


async def stranger_at(swarm: Swarm, victim: Peer) -> Stranger:
    peer = await swarm.join()
    await swarm.settle()
    return Stranger(peer, victim, await peer.stages.link_pool.link_to(victim.id))


@asynccontextmanager
async def under_attack(*spans: tuple[int, int]) -> AsyncIterator[tuple[Swarm, Peer, Stranger]]:
    """Give a swarm, a coordinator, and a stranger at the peer of the middle span."""
    async with open_swarm() as swarm:
        for span in spans:
            await swarm.join(span)
        coordinator = await swarm.join()
        yield swarm, coordinator, await stranger_at(swarm, swarm.peers[len(spans) // 2])


def hidden(*values: float, rows: int = 1, width: int = HIDDEN) -> Tensor:
    """Return rows of f32, the first elements of which are given."""
    elements = array("f", [1.0] * rows * width)
    elements[: len(values)] = array("f", values)
    return Tensor(DType.FLOAT32, (rows, width), elements.tobytes())


def halves(bits: int, dtype: DType) -> Tensor:
    """Return a row of 16-bit numbers, the last of which is given."""
    return Tensor(dtype, (1, HIDDEN), bytes(2 * HIDDEN - 2) + bits.to_bytes(2, "little"))


def blocks(scale_bits: int) -> Tensor:
    """Return a row of int8 with a scale for all of them."""
    return Tensor(DType.BLOCK_INT8, (1, HIDDEN), scale_bits.to_bytes(2, "little") + b"\x01" * HIDDEN)


def a_slice(
    session: SessionId, tensor: Tensor, position: int = 0, draws: int = 0, drafts: tuple[int, ...] = ()
) -> Slice:
    return Slice(session=session, position=position, rows=tensor.rows, draws=draws, drafts=drafts)


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
async def test_bad_rows_cost_their_session_and_are_put_down_to_their_sender(
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


async def test_whoever_sends_bad_rows_waits_ever_longer(virtual_clock: MockClock) -> None:
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


async def test_large_rows_are_checked_piece_by_piece_and_keep_their_order(virtual_clock: MockClock) -> None:
    rows = CHECKED_AT_ONCE_BYTES // (4 * HIDDEN) + 100
    async with open_swarm() as swarm:
        await swarm.join((0, 3))
        victim = await swarm.join((3, 6), kv_positions=1 << 16, max_positions=1 << 16)
        stranger = await stranger_at(swarm, victim)
        session = await stranger.begin(rows + 10)
        bad = hidden(rows=rows)
        data = bytearray(bad.data)
        data[-4:] = array("f", [NAN]).tobytes()
        await stranger.send(a_slice(session, bad), Tensor(bad.dtype, bad.shape, bytes(data)))
        await stranger.send(a_slice(session, hidden(), position=rows), hidden())
        lost = await stranger.until_lost()
        assert "not finite" in lost.message
        assert victim.engines[0].statistics().steps == 0


async def test_rows_beyond_what_is_reserved_end_the_session_and_then_the_link(virtual_clock: MockClock) -> None:
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


async def test_rows_before_begin_are_bounded_by_what_is_reserved(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        victim = await swarm.join((3, 6))
        opener, sender = await stranger_at(swarm, victim), await stranger_at(swarm, victim)
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

    opener: Stranger
    sender: Stranger
    session: SessionId

    def faults(self) -> tuple[int, int]:
        """Return how many faults the victim has put down to the opener, and to the sender."""
        found = self.opener.victim.stages.peer_statistics()
        return tuple(found[peer].faults if peer in found else 0 for peer in (self.opener.id, self.sender.id))  # type: ignore[return-value]


@asynccontextmanager
async def framed(span: tuple[int, int] = (3, 6)) -> AsyncIterator[Framed]:
    async with open_swarm() as swarm:
        victim = await swarm.join(span)
        opener, sender = await stranger_at(swarm, victim), await stranger_at(swarm, victim)
        yield Framed(opener, sender, opener.opening().session)


@pytest.mark.parametrize(
    ("span", "tensor", "position", "is_begun"),
    [
        ((3, 6), hidden(rows=8), POSITIONS - 7, True),
        ((3, 6), hidden(), 3, True),
        ((3, 6), hidden(width=HIDDEN + 1), 0, True),
        ((3, 6), hidden(rows=POSITIONS), 0, False),
        ((0, 9), tensor_from_tokens([VOCABULARY]), 0, True),
    ],
    ids=["beyond its positions", "a gap", "another width", "twice all its positions", "tokens of another model"],
)
async def test_whoever_opens_a_session_pays_for_what_it_makes_others_send(
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
        assert honest in each.opener.victim.stages.spans()[0].sessions


async def test_stage_that_sends_what_no_honest_one_does_pays_itself(virtual_clock: MockClock) -> None:
    async with framed() as each:
        session = await each.opener.begin(upstream=(each.sender.id,))
        await each.sender.send(a_slice(session, hidden(NAN)), hidden(NAN))
        await each.opener.until_lost()
        assert each.faults() == (0, 1)


async def test_rows_go_to_nobody_but_the_session_that_has_admitted_them(virtual_clock: MockClock) -> None:
    """While they come, it is closed and opened anew, with other positions."""
    async with under_attack((0, 3), (3, 6), (6, 9)) as (swarm, _coordinator, stranger):
        opener = await stranger_at(swarm, stranger.victim)
        (span,) = stranger.victim.stages.spans()
        opening = replace(opener.opening(), upstream=(stranger.id,))
        session = opening.session
        await opener.open_with(opening)
        step = Step(slices=(a_slice(session, hidden(rows=8)),), tensor=hidden(rows=8))
        header, data = encode_step_header(step), step.tensor.data
        first = encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header, data[:64])
        await stranger.say(first)
        assert span.sessions[session].held_rows == 8
        await opener.link.close(session)
        await opener.open_with(replace(opening, positions=4))
        await stranger.say(encode_frame(FrameType.CHUNK, data[64:]))
        assert span.sessions[session].held_rows == 0
        assert span.sessions[session].state.counters.bytes_in == 0
        assert not stranger.link.broken


async def test_session_that_does_not_begin_ends_and_its_coordinator_is_told(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, _coordinator, stranger):
        await stranger.open()
        await trio.sleep(BEGIN_LIMIT_S - 1)
        assert stranger.victim.held()[0] == 1
        await trio.sleep(3)
        assert stranger.victim.held() == (0, 0)
        assert [lost.reason for lost in stranger.lost] == [FailureReason.EXPIRED]
        assert not stranger.link.broken


async def test_session_that_does_not_begin_wins_no_time_by_going_on_as_others(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, _coordinator, stranger):
        opening = stranger.opening()
        await stranger.open_with(opening)
        for _ in range(2):
            await trio.sleep(BEGIN_LIMIT_S * 0.45)
            opening = replace(stranger.opening(), continues=opening.session)
            await stranger.open_with(opening)
        await trio.sleep(BEGIN_LIMIT_S * 0.1 + 3)
        assert stranger.victim.held() == (0, 0)


def test_idle_sessions_outlast_the_search_for_another_route_while_memory_is_short() -> None:
    assert SHORT_IDLE_LIMIT_S > RECOVERY_LIMIT_S


def test_of_frames_that_are_not_complete_those_go_first_that_do_not_go_on() -> None:
    """However many peers have begun one, and each with less than the honest one."""
    buffers = LinkBuffers()
    ended: list[str] = []

    class Link:
        def __init__(self, name: str) -> None:
            self.peer = PeerId(name)

        def end(self, why: str) -> None:
            ended.append(self.peer)

    honest, *others = (cast("InboundLink", Link(f"peer {number}")) for number in range(40))
    for step, other in enumerate(others, 1):
        buffers.update_partial(honest, (1 << 20) * step // len(others))
        buffers.update_partial(other, 900 << 10)
    assert honest.peer not in ended
    assert ended == [other.peer for other in others[: len(ended)]]
    assert buffers.partial_bytes <= PARTIAL_BYTES


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "being opened"])
async def test_descriptions_of_sessions_are_bounded_and_leave_room_for_others(
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


async def test_hoarder_leaves_room_for_the_nodes_own_jobs_and_for_others(virtual_clock: MockClock) -> None:
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
        large = JobRequest(model="fake", prompt=PROMPT, max_tokens=3500)
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


async def test_memory_of_a_session_that_goes_on_as_a_smaller_one_still_counts(virtual_clock: MockClock) -> None:
    async with under_attack((0, 9)) as (_, _coordinator, stranger):
        for _ in range(3):
            former = await stranger.begin(1024)
            await stranger.open_with(replace(stranger.opening(32), continues=former))
        statistics = stranger.victim.stages.peer_statistics()[stranger.id]
        (span,) = stranger.victim.stages.spans()
        assert (statistics.sessions, statistics.positions) == (3, 3 * 1024)
        assert span.held_pages() == {stranger.id: 3 * 1024 // PAGE_POSITIONS}


async def test_the_first_comer_leaves_the_reserve_to_the_nodes_own_jobs(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        victim = await swarm.join((0, 9), kv_positions=1024, max_positions=1024)
        stranger = await stranger_at(swarm, victim)
        with pytest.raises(SessionRefused) as refused:
            await stranger.begin(1024)
        assert refused.value.reason is RefusalReason.FULL
        await stranger.begin(1024 * 7 // 8)
        assert (await victim.run(REQUEST)).token_ids == right_tokens(12)


def test_fair_share_refuses_whoever_holds_more_than_it_first() -> None:
    own, a, b, c = (peer_id_from_public_key(bytes([number]) * 32) for number in range(4))
    assert may_take(a, 700, own=own, pages=800, held={}), "whoever comes first may have all but the reserve"
    assert not may_take(a, 701, own=own, pages=800, held={})
    assert may_take(a, 600, own=own, pages=800, held={own: 200, b: 0})
    assert not may_take(a, 601, own=own, pages=800, held={own: 200, b: 0})
    assert may_take(own, 800, own=own, pages=800, held={})
    assert may_take(a, 3, own=own, pages=3, held={}), "small memory has no room for reserves"
    assert may_take(a, 80, own=own, pages=800, held={a: 500})
    assert not may_take(a, 80, own=own, pages=800, held={a: 590})
    assert may_take(b, 80, own=own, pages=800, held={a: 590})
    assert not may_take(b, 200, own=own, pages=800, held={a: 590}), "there is not so much"
    assert may_take(own, 200, own=own, pages=800, held={a: 590})
    assert may_take(a, 100, own=own, pages=800, held={a: 250, b: 100, c: 50})
    assert not may_take(a, 100, own=own, pages=800, held={a: 250, b: 100, c: 50}, waiting=350)
    assert may_take(b, 100, own=own, pages=800, held={a: 250, b: 100, c: 50}, waiting=350)
    assert may_take(a, 1, own=own, pages=3, held={a: 1}), "small memory has no room for reserves"


async def test_outputs_that_wait_for_a_slow_link_again_and_again_leave_in_order(virtual_clock: MockClock) -> None:
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
