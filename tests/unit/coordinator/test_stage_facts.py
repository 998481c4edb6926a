"""What a machine measured decides about its jobs: from its signed capabilities to the matrix that is learned from."""

from collections.abc import Mapping, Sequence

import numpy as np
import trio
from trio.testing import MockClock

from node.coordinator.observation import Recorder
from node.coordinator.submission import JobRequest
from node.identity import Identity
from node.selection.samples import sample_of
from node.stages.voter import StageVote
from protocol.identity import ModelId
from protocol.observations import SignedObservation, verify_observation
from selector.dataset import Pairs
from selector.features import PHYSICS, physics
from selector.task import PORTFOLIO, Method, TaskContext
from selector.task_buckets import canonicalise
from selector.task_features import tabulate
from tests.support.heuristic_selection import HeuristicVoter
from tests.support.job_peers import open_swarm

REQUEST = JobRequest(model="fake", prompt_tokens=tuple(range(40)), max_tokens=8, ignore_eos=True)


class RecordingVoter(HeuristicVoter):
    """Records the contexts that it votes on."""

    def __init__(self) -> None:
        self.contexts: list[TaskContext] = []

    async def vote(self, model: ModelId, context: TaskContext, methods: Sequence[Method]) -> StageVote:
        self.contexts.append(context)
        return await super().vote(model, context, methods)


def features(context: TaskContext) -> Mapping[str, float]:
    table = tabulate([canonicalise(context)])
    return dict(zip(table.columns, table.features[0].tolist(), strict=True))


async def test_stages_vote_on_the_features_that_are_learned_from(virtual_clock: MockClock) -> None:
    identity, voter = Identity(b"7" * 32), RecordingVoter()
    published: list[SignedObservation] = []

    async def publish(observation: SignedObservation) -> None:
        await trio.lowlevel.checkpoint()
        published.append(verify_observation(observation.envelope))  # as another peer reads it

    async with open_swarm() as swarm:
        await swarm.join((0, 5), voter=voter)
        await swarm.join((5, 9), voter=voter)
        peer = await swarm.join(recorder=Recorder(identity, publish))
        await swarm.settle()
        await peer.run(REQUEST)
    [observation] = published
    assert [each.blocks for each in observation.observation.stage_facts] == [5, 4]
    sample = sample_of(observation.observation)
    assert sample is not None
    learned = features(sample.context)
    assert len(voter.contexts) == 2
    for context in voter.contexts:
        np.testing.assert_equal(features(context), learned)
    count = len(PORTFOLIO)
    pairs = Pairs(
        tabulate([canonicalise(sample.context)]), tuple(PORTFOLIO), np.zeros(count, dtype=np.intp), np.arange(count)
    )
    of_links = PHYSICS.index("communication")  # so little was sent that no rate is known
    assert np.isfinite(np.delete(physics(pairs), of_links, axis=1)).all()
