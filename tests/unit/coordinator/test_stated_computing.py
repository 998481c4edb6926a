"""What stages state of their computing: nobody learns from figures that cannot be, whatever they are."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.api.explanation import past_decisions
from node.coordinator.observation import Recorder
from node.coordinator.submission import JobError, JobRequest, JobResult
from node.coordinator.trial import Spending
from node.coordinator.trial_runner import BenchmarkRunner
from node.engine.interface import Variant
from node.identity import Identity
from node.links.inbound_link import InboundLink
from node.selection.adoption_trials import AdoptionTrials
from node.selection.chooser import LearnedChooser
from node.selection.prediction_cache import PredictionCache
from node.selection.trial_scheduler import TrialRequest
from node.stages.local_id import local_id
from node.testing.fake_engine import FAKE_MODEL
from protocol.identity import SessionId
from protocol.measurements import Objective
from protocol.messages import Closed, SessionStatistics
from protocol.observations import SignedObservation
from selector.adoption import Adoption
from selector.task import BASELINE, Method, method
from tests.support.job_peers import Peer, Swarm, open_swarm

FUSED = method(engine="fused")
FAST, SLOW = ({Variant("fused", "fp32"): factor} for factor in (1 / 3, 3.0))


class Liar:
    """A peer whose sessions end with made-up seconds of computing, of one method or of all."""

    def __init__(self, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peer = peer
        self.compute_s: float | None = None
        self.method: Method | None = None
        self._close = peer.stages.close
        monkeypatch.setattr(peer.stages, "close", self.close)

    async def close(self, session: SessionId, link: InboundLink) -> Closed:
        here = local_id(session, link.peer)
        found = next(span.sessions[here] for span in self.peer.stages.spans() if here in span.sessions)
        closed = await self._close(session, link)
        if self.compute_s is None or (self.method is not None and self.method != found.method):
            return closed
        return replace(closed, statistics=replace(closed.statistics, compute_s=self.compute_s))


async def liar_and_client(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, **serving: Any
) -> tuple[Liar, Peer, LearnedChooser]:
    liar = Liar(await swarm.join((0, 9), **serving), monkeypatch)
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


@pytest.mark.parametrize(
    ("slowness", "in_use", "stated_s", "chosen"),
    [
        (FAST, BASELINE, None, FUSED),
        (SLOW, BASELINE, 1e-3, BASELINE),
        (FAST, FUSED, 1.5, FUSED),
        (FAST, BASELINE, 1e-3, FUSED),
    ],
    ids=["honest", "the slow one stated to be cheap", "the one in use stated to be dear", "the fast one exaggerated"],
)
async def test_stated_computing_makes_no_node_use_a_slow_method(
    slowness: Mapping[Variant, float],
    in_use: Method,
    stated_s: float | None,
    chosen: Method,
    virtual_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A method takes three times as long as the other, or a third, and its only stage states its computing of it."""
    async with open_swarm() as swarm:
        liar, client, _ = await liar_and_client(swarm, monkeypatch, step_s=0.1, slowness=slowness)
        liar.method, liar.compute_s = FUSED, stated_s
        ratios = await try_fused(client, in_use)
        assert Adoption().record_trial("bucket", in_use.name, ratios, 0.0) == chosen.name


async def test_trial_of_computing_that_a_stage_does_not_state_is_given_up(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        liar, client, _ = await liar_and_client(swarm, monkeypatch)
        liar.method, liar.compute_s = FUSED, 1e9
        with pytest.raises(JobError, match="did not state their cost"):
            await try_fused(client, BASELINE)


async def try_fused(client: Peer, in_use: Method) -> Mapping[str, Sequence[float]]:
    """Return how a method did in a trial for jobs that are to compute little."""

    async def publish(observation: SignedObservation) -> None:
        del observation
        await trio.lowlevel.checkpoint()

    trials = AdoptionTrials(BenchmarkRunner(client.coordinator, Recorder(Identity(b"7" * 32), publish)))
    considered = await client.coordinator.consider(JobRequest(model="fake", prompt="1", max_tokens=8), {})
    context = replace(considered.context, objective=Objective.THROUGHPUT.value)
    methods = [BASELINE, FUSED]
    request = TrialRequest(model=FAKE_MODEL, context=context, methods=methods, in_use=in_use.name)
    return await trials.run(request, Spending())
