"""A client may go away at any moment of its job; nothing of it stays anywhere."""

import random
from dataclasses import replace
from typing import Any

import pytest
import trio

from node.coordinator.submission import JobRequest
from node.links.buffers import OUTBOX_BYTES
from node.links.outbound_link import OutboundLink
from node.testing.memory_links import LinkModel
from tests.simulation.virtual_time import run
from tests.support.job_peers import Peer, Swarm, an_opening, open_swarm

REQUEST = JobRequest(model="fake", prompt="3 1 4 1 5 9 2 6", max_tokens=6)
ROUNDS, AT_A_TIME = 10, 20


class GoesAway(trio.abc.Instrument):
    """Cancels a job once the scheduler has taken so many steps of any task: at each await point of whatever runs."""

    def __init__(self, steps: int, scope: trio.CancelScope) -> None:
        self._left = steps
        self._scope = scope

    def after_task_step(self, task: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()


def left_behind(swarm: Swarm) -> list[str]:
    """Say what is held of any job, on whichever peer."""
    found = []
    for number, peer in enumerate(swarm.peers):
        link_pool = peer.stages.link_pool
        links = list(link_pool._links.values())
        held: dict[str, object] = {
            "sessions and positions": peer.held() if peer.held() != (0, 0) else None,
            "receivers": len(link_pool.receivers),
            "watchers": sum(len(link._watchers) for link in links),
            "replies": sum(len(link._openings) + len(link._closings) + len(link._progress_replies) for link in links),
            "sessions of links": sum(link._connection.session_count for link in links),
            "jobs": peer.coordinator.statistics.running,
        }
        found += [f"peer {number}: {what}: {value}" for what, value in held.items() if value]
    return found


async def disconnect(peer: Peer, steps: int) -> None:
    with trio.CancelScope() as scope:
        instrument = GoesAway(steps, scope)
        trio.lowlevel.add_instrument(instrument)
        try:
            await peer.run(REQUEST)
        finally:
            trio.lowlevel.remove_instrument(instrument)


@pytest.mark.parametrize("seed", range(10))
def test_two_thousand_early_disconnects_leave_nothing_behind(seed: int) -> None:
    async def program() -> None:
        rng = random.Random(seed)
        # Latency that has a resolution lets messages arrive together, as they do from a real socket.
        link = LinkModel(latency_s=0.001, jitter_s=0.004 * (seed % 3), resolution_s=0.002 * (seed % 2))
        async with open_swarm(seed, link) as swarm:
            await swarm.join((0, 4), step_s=0.002)
            await swarm.join((4, 9), step_s=0.002)
            peers = [await swarm.join(), swarm.peers[0]]
            await swarm.settle()
            await trio.sleep(5)  # until all have reached each other
            await peers[0].run(REQUEST)
            for _ in range(ROUNDS):
                async with trio.open_nursery() as nursery:
                    for number in range(AT_A_TIME):
                        nursery.start_soon(disconnect, peers[number % 2], rng.randrange(1, 1500))
                await trio.sleep(1)
                assert left_behind(swarm) == []

    run(program, seed=seed)


def test_close_that_overtakes_its_open_closes_the_session() -> None:
    async def program() -> None:
        async with open_swarm() as swarm:
            stage, coordinator = await swarm.join((0, 9)), await swarm.join()
            await swarm.settle()
            link = await coordinator.stages.link_pool.link_to(stage.id)
            for number in range(50):
                opening = an_opening(stage)
                session = opening.session._replace(stage=number)
                link._send_now(replace(opening, session=session, positions=32))
                await link.close(session)
            await trio.sleep(0.5)
            assert stage.held() == (0, 0)

    run(program, seed=3)


def test_close_is_sent_though_the_link_is_full() -> None:
    async def program() -> None:
        async with open_swarm(link=LinkModel(latency_s=0.001, bandwidth=1e5)) as swarm:
            stage, coordinator = await swarm.join((0, 9)), await swarm.join()
            await swarm.settle()
            link: OutboundLink = await coordinator.stages.link_pool.link_to(stage.id)
            opening = an_opening(stage)
            await link.open(opening)
            # What other sessions send fills the outbox for longer than the end of a job waits.
            link._queue._count(OUTBOX_BYTES + 1)
            with trio.move_on_after(1):
                await link.close(opening.session)
            link._queue._count(-OUTBOX_BYTES - 1)
            await trio.sleep(1)
            assert stage.held() == (0, 0)

    run(program, seed=1)
