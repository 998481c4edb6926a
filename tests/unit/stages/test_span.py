"""Spans: the memory of sessions whose coordinators come and go."""

from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from node.engine.interface import (
    PAGE_HASH_BYTES,
    REFERENCE,
    EngineError,
    NoVariantMemory,
    SessionOptions,
    Variant,
    variant_of,
)
from node.links.base_link import LinkBroken
from node.links.outbound_link import SessionRefused
from node.stages import span
from node.stages.local_id import local_id
from node.stages.span import BEGIN_LIMIT_S, IDLE_LIMIT_S, SHORT_IDLE_LIMIT_S, SHORT_TOTAL_S
from node.stages.variant_builder import UNUSED_S
from node.testing.fake_engine import FakeEngine
from protocol.identity import SessionId
from protocol.messages import Ballot, Begin, FailureReason, Open, RefusalReason
from protocol.tensors import tensor_from_tokens
from selector.task import Method, method, parse_method
from tests.support.job_peers import open_swarm
from tests.support.raw_coordinator import RawCoordinator, a_slice, hidden, raw_coordinator_at

CACHING = parse_method("prefix_cache=on")


async def test_session_lost_while_taking_over_another_frees_its_memory(virtual_clock: MockClock) -> None:
    """The coordinator leaves amid the step after which what the former session holds is its successor's."""
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9), step_s=1.0, row_s=0.0)
        coordinator = await raw_coordinator_at(swarm, server)
        former = await coordinator.begin()
        tokens = tensor_from_tokens([1])
        await coordinator.send(a_slice(former, tokens), tokens)
        await trio.sleep(0.5)
        successor = replace(coordinator.opening(), continues=former)

        async def leave() -> None:
            await trio.sleep(0.2)
            assert [each.wire_id for each in server.stages.spans()[0].sessions.values()] == [successor.session]
            assert server.held()[1] > 0
            coordinator.link.end("left")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            with pytest.raises(LinkBroken, match="left"):
                await coordinator.open_with(successor)
        await trio.sleep(2)
        assert server.held() == (0, 0)


async def test_fails_session_that_engine_cannot_begin(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(session: SessionId, options: SessionOptions) -> int:
        raise EngineError

    async with open_swarm() as swarm:
        server = await swarm.join((0, 9))
        coordinator = await raw_coordinator_at(swarm, server)
        monkeypatch.setattr(server.engines[0], "begin", fail)
        await coordinator.begin()
        assert (await coordinator.until_lost()).reason is FailureReason.ENGINE
        await trio.sleep(1)
        assert server.held() == (0, 0)


def with_memory_for_one_variant(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Return an engine that has memory for one variant beside its reference."""
    build = engine.prepare

    async def build_one(variant: Variant) -> None:
        if variant not in engine.variants() and len(engine.variants()) > 1:
            raise NoVariantMemory(f"no memory for {variant}")
        await build(variant)

    monkeypatch.setattr(engine, "prepare", build_one)
    return engine


async def ask(coordinator: RawCoordinator, wanted: Method) -> RefusalReason | None:
    """Open a session that is never begun; return why it is refused."""
    try:
        await coordinator.open_with(replace(coordinator.opening(), methods=(wanted.name,)))
    except SessionRefused as refused:
        return refused.reason
    return None


@pytest.mark.parametrize("asked", ["before it is built", "with a draft model that is not ready"])
async def test_first_variant_stays_also_where_a_job_asked_for_it(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    fused, graphs = method(engine="fused"), method(engine="onnxruntime")
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9), variants=[REFERENCE])
        engine = with_memory_for_one_variant(server.engines[0], monkeypatch)
        server.stages.register_draft([engine.info.model])
        coordinator = await raw_coordinator_at(swarm, server)
        server.stages.spans()[0].variants.request_first_of([variant_of(fused)])
        if asked == "before it is built":
            assert await ask(coordinator, fused) is RefusalReason.NOT_READY
        await trio.sleep(60)
        assert engine.variants() == {REFERENCE, variant_of(fused)}
        if asked == "with a draft model that is not ready":
            assert await ask(coordinator, method(engine="fused", speculation="draft-8")) is RefusalReason.NOT_READY
        await trio.sleep(UNUSED_S + 60)
        assert await ask(coordinator, graphs) is RefusalReason.NOT_READY
        await trio.sleep(60)
        assert engine.variants() == {REFERENCE, variant_of(fused)}


async def test_unused_variant_gives_its_memory_to_one_that_is_used(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, graphs = method(engine="fused"), method(engine="onnxruntime")
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9), variants=[REFERENCE])
        engine = with_memory_for_one_variant(server.engines[0], monkeypatch)
        stranger, user = [await raw_coordinator_at(swarm, server) for _ in range(2)]
        assert await ask(stranger, graphs) is RefusalReason.NOT_READY
        await trio.sleep(60)
        assert await ask(stranger, graphs) is None
        assert await ask(user, fused) is RefusalReason.NOT_READY
        await trio.sleep(60)
        assert await ask(user, fused) is RefusalReason.UNABLE, "the other one may still be used"
        await trio.sleep(UNUSED_S)
        assert await ask(user, fused) is RefusalReason.NOT_READY
        await trio.sleep(60)
        assert await ask(user, fused) is None
        assert engine.variants() == {REFERENCE, variant_of(fused)}

        opening = replace(user.opening(), methods=(fused.name,))
        opened = await user.open_with(opening)
        ballots = (Ballot(server.id, (opened.votes[fused.name],)), Ballot(user.id, (0.0,)))
        user.link.begin(Begin(session=opening.session, method=fused.name, ballots=ballots))
        await trio.sleep(UNUSED_S / 3)
        await user.link.close(opening.session)
        await trio.sleep(UNUSED_S - 60)
        assert await ask(stranger, graphs) is RefusalReason.NOT_READY
        await trio.sleep(59)
        assert engine.variants() == {REFERENCE, variant_of(fused)}, "it was used within the time"


async def refuse_memory(other: RawCoordinator, seconds: float) -> None:
    """Have a peer refused the memory that another one's sessions hold, again and again for some time."""
    until_s = trio.current_time() + seconds
    while trio.current_time() < until_s:
        with pytest.raises(SessionRefused) as refused:
            await other.begin(512)
        assert refused.value.reason is RefusalReason.FULL
        await trio.sleep(25)


async def test_session_whose_rows_wait_or_are_computed_survives_short_memory(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9), step_s=100.0, row_s=0.0, kv_positions=1024, max_positions=1024)
        tenant, other = [await raw_coordinator_at(swarm, server) for _ in range(2)]
        tokens = tensor_from_tokens([1])
        sessions = [await tenant.begin(384) for _ in range(2)]
        for session in sessions:  # the second one's rows wait for the first one's step
            await tenant.send(a_slice(session, tokens), tokens)
            await trio.sleep(1)
        await refuse_memory(other, SHORT_IDLE_LIMIT_S + 50)
        assert not tenant.lost
        await refuse_memory(other, 60)
        assert [lost.reason for lost in tenant.lost] == [FailureReason.EXPIRED], "the first one has been idle since"
        assert [each.wire_id for each in server.stages.spans()[0].sessions.values()] == sessions[1:]


async def test_later_stage_awaits_first_rows_though_memory_is_short(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        server = await swarm.join((3, 6), kv_positions=1024, max_positions=1024)
        tenant, other = [await raw_coordinator_at(swarm, server) for _ in range(2)]
        await tenant.begin(768)
        await refuse_memory(other, IDLE_LIMIT_S - 25)
        assert not tenant.lost
        await trio.sleep(50)
        assert [lost.reason for lost in tenant.lost] == [FailureReason.EXPIRED]


async def test_rows_now_and_then_do_not_hold_short_memory_for_ever(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9), row_s=0.0, kv_positions=1024, max_positions=1024)
        tenant, other = [await raw_coordinator_at(swarm, server) for _ in range(2)]
        tokens = tensor_from_tokens([1])
        session = await tenant.begin(768)
        began_s = trio.current_time()
        for number in range(200):
            if number % 3 == 0:
                await tenant.send(a_slice(session, tokens, number // 3), tokens)
            if number == 100:  # so far no other peer wants it
                began_s = trio.current_time()
            if number >= 100:
                with suppress(SessionRefused):
                    await other.begin(512)
                    break
            await trio.sleep(25)
        assert [lost.reason for lost in tenant.lost] == [FailureReason.EXPIRED]
        assert SHORT_TOTAL_S <= trio.current_time() - began_s < 1.1 * SHORT_TOTAL_S


async def test_session_that_decodes_all_the_time_is_not_idle(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span, "SHORT_TOTAL_S", 60.0)
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9), row_s=0.0, kv_positions=1024, max_positions=1024)
        tenant, other = [await raw_coordinator_at(swarm, server) for _ in range(2)]
        tokens = tensor_from_tokens([1])
        session = await tenant.begin(768)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse_memory, other, 120.0)
            for number in range(600):
                await tenant.send(a_slice(session, tokens, number), tokens)
                await trio.sleep(0.2)
        assert not tenant.lost


@pytest.mark.parametrize("takes_s", [3 * BEGIN_LIMIT_S, 2 * IDLE_LIMIT_S], ids=["slow", "stuck"])
async def test_session_whose_begin_has_come_has_time_to_load(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, takes_s: float
) -> None:
    async with open_swarm() as swarm:
        server = await swarm.join((0, 9))
        coordinator = await raw_coordinator_at(swarm, server)
        begin = server.engines[0].begin

        async def load(session: SessionId, options: SessionOptions) -> int:
            await trio.sleep(takes_s)
            return await begin(session, options)

        monkeypatch.setattr(server.engines[0], "begin", load)
        session = await coordinator.begin()
        await trio.sleep(min(takes_s, IDLE_LIMIT_S) + 5)
        if takes_s < IDLE_LIMIT_S:
            assert server.stages.spans()[0].sessions[local_id(session, coordinator.id)].method is not None
        else:
            assert [lost.reason for lost in coordinator.lost] == [FailureReason.EXPIRED]


async def test_what_was_computed_of_rejected_rows_is_not_cached(virtual_clock: MockClock) -> None:
    """Also while a step with rows of the session is under way, after which another attempt has opened already."""
    async with open_swarm() as swarm:
        server = await swarm.join((3, 6), step_s=1.0, row_s=0.0)
        coordinator = await raw_coordinator_at(swarm, server)

        def opening() -> Open:
            return replace(coordinator.opening(128), methods=(CACHING.name,), prefix=bytes(range(3 * PAGE_HASH_BYTES)))

        first = opening()
        opened = await coordinator.open_with(first)
        ballots = (Ballot(server.id, (opened.votes[CACHING.name],)), Ballot(coordinator.id, (0.0,)))
        coordinator.link.begin(Begin(session=first.session, method=CACHING.name, ballots=ballots))
        for position, rows in ((0, hidden(rows=64)), (64, hidden(rows=32))):
            await coordinator.send(a_slice(first.session, rows, position), rows)
            await trio.sleep(1.5 - position / 64)
        assert set((await coordinator.open_with(opening())).cached.values()) == {64}
        await coordinator.send(a_slice(first.session, hidden(float("nan")), 96), hidden(float("nan")))
        lost = await coordinator.until_lost(2)  # the first says that there is no next stage
        assert lost.reason is FailureReason.ENGINE
        assert local_id(first.session, coordinator.id) in server.stages.spans()[0]._in_step
        assert (await coordinator.open_with(opening())).cached == {}
        await trio.sleep(2)
        assert (await coordinator.open_with(opening())).cached == {}
