"""The consensus of several models over one set of neighbours."""

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from node.consensus.environment import ConsensusEnvironment, ConsensusRules
from node.consensus.followed_chains import FollowedChains
from node.consensus.measurement_runner import measurement_plan
from node.consensus.service import ConsensusService
from node.identity import Identity
from node.replication.session import SessionOutcome
from node.storage import chain_store
from node.storage.chain_store import StoredStatement
from node.storage.database import StorageError
from node.testing.chain_store import memory_chain_store
from node.testing.memory_history import MemoryHistory
from node.testing.memory_network import MemoryNetworkHub
from node.util.offload import run_inline
from node.util.signal import Signal
from protocol.consensus import verify_message
from protocol.identity import ModelId, PeerId
from selector.consensus.clock import EpochClock
from selector.consensus.sortition import MeasurementPlan

EPOCH_S = 600.0
SESSION_S = 3.0


class OneNeighbour:
    """A pull service with a single neighbour, with which one session at a time is possible."""

    def __init__(self) -> None:
        self.pulling = 0
        self.began_s: list[float] = []

    def choose_neighbour(self) -> PeerId | None:
        return None if self.pulling else PeerId("neighbour")

    async def pull(self, peer: PeerId, initiate: object) -> SessionOutcome:
        self.began_s.append(trio.current_time())
        self.pulling += 1
        await trio.sleep(SESSION_S)
        self.pulling -= 1
        return SessionOutcome(equal=True)


def consensus_service() -> Any:
    network = MemoryNetworkHub(random.Random(0)).network(Identity(bytes(32)).peer_id)
    rules = ConsensusRules(swarm=b"", plan=MeasurementPlan((), ()), clock=EpochClock(EPOCH_S))
    environment = cast("Any", SimpleNamespace(verify=verify_message))
    return ConsensusService(network, FollowedChains(), environment, rules.clock, lambda _: rules, random.Random(0))


async def test_chain_waits_for_a_neighbour_that_is_busy_with_another_chain(autojump_clock: MockClock) -> None:
    service = consensus_service()
    service._pull = OneNeighbour()
    with trio.move_on_after(EPOCH_S / 40):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(service._pull_loop, SimpleNamespace(needs_sync=Signal()))
    assert len(service._pull.began_s) == 4


async def test_chain_fetches_and_takes_part_only_once_it_is_loaded(autojump_clock: MockClock) -> None:
    service, did, fails = consensus_service(), list[str](), [True, True, False]

    class Chain:
        needs_sync = Signal()

        async def load(self) -> None:
            await trio.sleep(1)
            did.append("load")
            if fails.pop(0):
                raise StorageError("unable to open database file")

        async def run(self) -> None:
            did.append("run")
            await trio.sleep_forever()

    service._pull = OneNeighbour()
    with trio.move_on_after(0.4 * EPOCH_S):
        await service._run_chain(Chain(), trio.CancelScope())
    assert did == ["load", "load", "load", "run"]
    assert service._pull.began_s[0] >= 0.2 * EPOCH_S, "a vote of before the restart is not known earlier"


async def test_chain_follows_the_package_format_once_it_is_known(autojump_clock: MockClock) -> None:
    identity, model, chains = Identity(bytes(32)), ModelId("ab" * 32), FollowedChains()
    known_format = "safetensors"  # as long as the manifest is elsewhere

    def rules(model: ModelId) -> ConsensusRules:
        return ConsensusRules(swarm=b"", plan=measurement_plan(known_format), clock=EpochClock(EPOCH_S))

    environment = ConsensusEnvironment(
        identity=identity,
        store=memory_chain_store(),
        history=MemoryHistory(),
        models=lambda: {model: False},
        hardware=lambda: None,
        meter=lambda _: cast("Any", None),
        offload=run_inline,
    )
    network = MemoryNetworkHub(random.Random(0)).network(identity.peer_id)
    service = ConsensusService(network, chains, environment, EpochClock(EPOCH_S), rules, random.Random(0))
    async with network.running(), trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        await trio.sleep(3)
        first = chains.nodes[model]
        await trio.sleep(3)
        assert chains.nodes[model] is first
        known_format = "gguf"
        await trio.sleep(3)
        second = chains.nodes[model]
        assert second.genesis == rules(model).genesis(model) != first.genesis
        assert {each.partition("engine=")[2].partition("|")[0] for each in measurement_plan("gguf").methods} == {
            "llamacpp",
            "onnxruntime",
        }
        nursery.cancel_scope.cancel()


async def test_chain_of_a_served_model_takes_the_place_of_one_that_is_gone_or_not_used(
    autojump_clock: MockClock,
) -> None:
    served, used, *others = (ModelId(f"{number:02x}" * 32) for number in (255, 254, *range(7)))
    models = dict.fromkeys(others, False) | {used: False}
    chains = FollowedChains()
    environment = ConsensusEnvironment(
        identity=Identity(bytes(32)),
        store=memory_chain_store(),
        history=MemoryHistory(),
        models=lambda: models,
        hardware=lambda: None,
        meter=lambda _: cast("Any", None),
        offload=run_inline,
    )
    rules = ConsensusRules(swarm=b"", plan=MeasurementPlan((), ()), clock=EpochClock(EPOCH_S))
    network = MemoryNetworkHub(random.Random(0)).network(environment.identity.peer_id)
    service = ConsensusService(network, chains, environment, rules.clock, lambda _: rules, random.Random(0))
    async with network.running(), trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        await trio.sleep(3)
        assert chains.nodes.keys() == {used, *others}
        del models[others[3]]
        models[served] = True
        await trio.sleep(3)
        assert chains.nodes.keys() == {used, served, *others} - {others[3]}, "the model is gone"
        chains.agreement(used)
        another = ModelId("fd" * 32)
        models |= {another: True, ModelId("fc" * 32): False}
        before = {*chains.nodes}
        await trio.sleep(3)
        assert {another, used, served} < chains.nodes.keys()
        assert len(before - chains.nodes.keys()) == 1, "nothing else changed places"
        assert service._by_genesis.keys() == {chain.genesis for chain in chains.nodes.values()}
        nursery.cancel_scope.cancel()


async def test_node_whose_clock_is_known_to_be_wrong_does_not_participate(autojump_clock: MockClock) -> None:
    model, agrees = ModelId("ab" * 32), [None, True, False]
    environment = SimpleNamespace(models=lambda: {model: True}, clock_agrees=lambda: agrees.pop(0), verify=None)
    network = MemoryNetworkHub(random.Random(0)).network(Identity(bytes(32)).peer_id)
    service = ConsensusService(
        network, FollowedChains(), cast("Any", environment), EpochClock(EPOCH_S), cast("Any", None), random.Random(0)
    )
    assert [service._participates(model) for _ in range(3)] == [True, True, False]


async def test_chain_of_a_model_that_is_gone_is_deleted(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_store, "UNFOLLOWED_S", 1800)
    gone, there = ModelId("01" * 32), ModelId("02" * 32)
    models, store, chains = {gone: True, there: True}, memory_chain_store(), FollowedChains()
    environment = ConsensusEnvironment(
        identity=Identity(bytes(32)),
        store=store,
        history=MemoryHistory(),
        models=lambda: models,
        hardware=lambda: None,
        meter=lambda _: cast("Any", None),
        offload=run_inline,
        wall_clock=trio.current_time,
        clock_agrees=lambda: True,
    )
    rules = ConsensusRules(swarm=b"", plan=MeasurementPlan((), ()), clock=EpochClock(EPOCH_S))
    geneses = [rules.genesis(model) for model in (gone, there)]
    for genesis in geneses:
        await store.save_branch(genesis, -1, [StoredStatement(1, genesis, b"", ())], None)
    network = MemoryNetworkHub(random.Random(0)).network(environment.identity.peer_id)
    service = ConsensusService(network, chains, environment, rules.clock, lambda _: rules, random.Random(0))
    monkeypatch.setattr(service, "_follow_new_models", lambda _: None)
    service._by_genesis[geneses[1]] = cast("Any", None)
    async with network.running(), trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        await trio.sleep(2.5 * 3600)
        nursery.cancel_scope.cancel()
    assert [len(await store.statements(genesis)) for genesis in geneses] == [0, 1]
