"""What stages state of their computing: nobody learns from figures that cannot be, whatever they are."""

import json
import random
from dataclasses import replace

import pytest
from trio.testing import MockClock

from node.api.explanation import past_decisions
from node.coordinator.submission import JobRequest, JobResult
from node.links.inbound_link import InboundLink
from node.selection.chooser import LearnedChooser
from node.selection.prediction_cache import PredictionCache
from protocol.identity import SessionId
from protocol.measurements import Objective
from protocol.messages import Closed, SessionStatistics
from tests.support.job_peers import Peer, Swarm, open_swarm


class Liar:
    """A peer whose sessions end with made-up seconds of computing."""

    def __init__(self, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peer = peer
        self.compute_s: float | None = None
        self._close = peer.stages.close
        monkeypatch.setattr(peer.stages, "close", self.close)

    async def close(self, session: SessionId, link: InboundLink) -> Closed:
        closed = await self._close(session, link)
        if self.compute_s is None:
            return closed
        return replace(closed, statistics=replace(closed.statistics, compute_s=self.compute_s))


async def liar_and_client(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> tuple[Liar, Peer, LearnedChooser]:
    liar = Liar(await swarm.join((0, 9)), monkeypatch)
    chooser = LearnedChooser(PredictionCache(), random.Random(1), share=0.0)
    client = await swarm.join(chooser=chooser)
    await swarm.settle()
    return liar, client, chooser


async def run(client: Peer) -> JobResult:
    job = JobRequest(model="fake", prompt_tokens=(1,) * 8, max_tokens=16, ignore_eos=True)
    return await client.run(replace(job, objective=Objective.THROUGHPUT))


async def test_computing_that_exceeds_the_job_is_ignored_and_costs_its_peer(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        liar, client, chooser = await liar_and_client(swarm, monkeypatch)
        honest = await run(client)
        liar.compute_s = 1e9
        lied = await run(client)
        assert [stage.statistics for stage in lied.route] == [SessionStatistics()]
        assert [stage.countersignature for stage in lied.route] == [None]
        assert client.coordinator.peer_records()[liar.peer.id].failed == 1
        liar.compute_s = None
        after = await run(client)
        took_s = honest.route[0].statistics.compute_s
        assert after.selection is not None
        assert after.selection.predicted_s < 2 * took_s
        assert len(chooser.decisions) == 2, "a job whose computing is unknown says nothing of its prediction"


async def test_computing_of_next_to_nothing_leaves_past_decisions_readable(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        liar, client, chooser = await liar_and_client(swarm, monkeypatch)
        liar.compute_s = 5e-324
        for _ in range(2):
            await run(client)
        past = past_decisions(chooser.decisions, 20)
        assert past["jobs"] == 2
        json.dumps(past, allow_nan=False)
