"""A stage that does not state what a job cost there: the cost is unknown, not nothing, and no peer learns from it."""

from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from node.api.job_document import describe_job
from node.coordinator.method_choice import Choice
from node.coordinator.observation import Recorder, ServedJob
from node.coordinator.submission import JobOutcome, JobRequest, JobResult
from node.coordinator.trial import Run
from node.identity import Identity
from node.links.inbound_link import InboundLink
from node.testing.memory_links import LinkModel
from protocol.identity import SessionId
from protocol.messages import Closed
from protocol.observations import SignedObservation
from tests.support.heuristic_selection import HeuristicChooser
from tests.support.job_peers import Peer, Swarm, open_swarm
from tests.unit.coordinator.test_jobs import PROMPT, THIRDS, right_tokens

REQUEST = JobRequest(model="fake", prompt=PROMPT, max_tokens=40)


class Outcomes(HeuristicChooser):
    """Notes what it is to learn from."""

    def __init__(self) -> None:
        self.compute_s: list[float] = []

    def served(self, choice: Choice, outcome: JobOutcome) -> None:
        del choice
        self.compute_s.append(outcome.compute_s)


@dataclass
class Watched:
    """A coordinator, and what it publishes and learns."""

    peer: Peer
    chooser: Outcomes
    published: list[SignedObservation] = field(default_factory=list)


async def watched(swarm: Swarm) -> Watched:
    """Return the coordinator of a swarm of three stages."""
    published: list[SignedObservation] = []

    async def publish(observation: SignedObservation) -> None:
        await trio.lowlevel.checkpoint()
        published.append(observation)

    for span in THIRDS:
        await swarm.join(span)
    chooser = Outcomes()
    peer = await swarm.join(chooser=chooser, recorder=Recorder(Identity(b"5" * 32), publish))
    await swarm.settle()
    return Watched(peer, chooser, published)


async def never(session: SessionId, link: InboundLink) -> Closed:
    """Answer no Close."""
    del session, link
    await trio.sleep_forever()
    raise AssertionError


async def test_cost_is_unknown_where_a_stage_does_not_answer_close(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        seen = await watched(swarm)
        monkeypatch.setattr(swarm.peers[1].stages, "close", never)
        result = await seen.peer.run(REQUEST)
        assert result.token_ids == right_tokens(40)
        assert result.cost is not None
        assert result.cost.actual is None
        document = describe_job(result)
        assert document["cost"]["actual"] is None
        assert [stage["compute_s"] is None for stage in document["route"]] == [False, True, False]
        assert [stage["queue_s"] is None for stage in document["route"]] == [False, True, False]


async def test_nothing_is_learned_from_a_job_whose_cost_is_unknown(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        seen = await watched(swarm)
        monkeypatch.setattr(swarm.peers[1].stages, "close", never)
        await seen.peer.run(REQUEST)
        assert not seen.published
        assert seen.chooser.compute_s == [0.0], "which says that it is unknown"
        assert not any(record.block_s for record in seen.peer.coordinator.peer_records().values())
        monkeypatch.undo()
        await seen.peer.run(REQUEST)
        assert len(seen.published) == 1
        assert seen.chooser.compute_s[1] > 0
        assert all(record.block_s for record in seen.peer.coordinator.peer_records().values())


async def test_trial_does_not_compare_a_run_whose_cost_is_unknown(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        peer = (await watched(swarm)).peer
        done: list[ServedJob] = []

        async def run() -> Run:
            async with peer.coordinator.submit(REQUEST, done.append) as events:
                results = [event async for event in events if isinstance(event, JobResult)]
            assert len(results) == 1
            return Run(jobs=[done.pop()])

        assert not (await run()).is_invalid
        monkeypatch.setattr(swarm.peers[1].stages, "close", never)
        assert (await run()).is_invalid


async def test_stage_behind_a_slow_link_has_time_to_state_its_cost(virtual_clock: MockClock) -> None:
    async with open_swarm(link=LinkModel(latency_s=0.55)) as swarm:
        result = await (await watched(swarm)).peer.run(REQUEST)
        assert all(stage.statistics.steps for stage in result.route)
        assert result.cost is not None
        assert result.cost.actual
