"""Status documents of peers: refusals, failures, what they hold, and bans."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from node.api.interface import JoinDocument
from node.models.files import MIN_FREE_BYTES
from node.models.manifest import Manifest
from node.network.interface import Way
from node.replication.peer_limits import Ban
from node.selection.chooser import LearnedChooser
from node.selection.prediction_cache import PredictionCache
from node.stages.peer_penalties import SessionTotals, StagePeerStatistics
from node.status import MAX_GAPS, MAX_OTHER_MODELS, StatusView
from node.swarm.directory import AnnouncedPlacements, Directory
from node.telemetry.observer import Telemetry
from protocol.announcements import Heartbeat, Placement, ServedSpan
from protocol.identity import BlockRange, ModelId, PeerId, peer_id_from_public_key
from protocol.messages import Load, RefusalReason
from selector.reliability import PeerRecord
from selector.routing import Link, Links
from selector.task import BASELINE, TaskContext, method

US, CONNECTED, HEARSAY, GONE = (peer_id_from_public_key(bytes([number]) * 32) for number in range(4))
MODEL = ModelId("ab" * 32)


ASKED = StagePeerStatistics(opened=5, refused={RefusalReason.FULL: 3}, faults=2, sessions=1, positions=64, bytes=4096)
LOAD = Load(sessions=2, queued_rows=5, free_positions=64, step_s=0.01)
SHOWN = PeerRecord(served=7, failed=1, lagged=1, trust=0.5, avoided_s=12.0, block_s={MODEL: 0.001})


def heartbeat(peer: PeerId) -> Heartbeat:
    return Heartbeat(
        peer=peer,
        sequence=1,
        issued_at_s=1_800_000_000,
        expires_at_s=1_800_000_060,
        interval_ms=2500,
        multiaddrs=(),
        agent="",
        spans=(ServedSpan(model=MODEL, blocks=BlockRange(0, 3), load=LOAD),),
    )


async def test_peers_shows_refusals_failures_held_bytes_and_bans() -> None:
    directory = Directory(own_peer=US, connected=lambda: [CONNECTED])
    for peer in (US, CONNECTED, HEARSAY):
        directory.update(heartbeat(peer), 0.0)
    network = SimpleNamespace(
        peer_id=US,
        connected_peers=lambda: (CONNECTED,),
        addresses_of=lambda peer: (),
        way_to=lambda peer: Way() if peer == CONNECTED else None,
    )
    membership = SimpleNamespace(directory=directory, round_trip_s=lambda peer: None)
    stages = SimpleNamespace(
        peer_statistics=lambda: {US: ASKED, CONNECTED: ASKED, GONE: replace(ASKED, sessions=0, bytes=0)},
        session_totals=lambda: SessionTotals(opened=10, refused=6),
    )
    coordinator = SimpleNamespace(peer_records=lambda: {CONNECTED: SHOWN})
    parts = SimpleNamespace(
        network=SimpleNamespace(network=network),
        swarm=SimpleNamespace(
            membership=membership,
            replicator=SimpleNamespace(bans=lambda: {GONE: Ban(9.0, "garbage")}),
            announcer=SimpleNamespace(known=lambda peer: None),
        ),
        serving=SimpleNamespace(stages=stages, library=SimpleNamespace(name_of=lambda model: "tiny")),
        client=SimpleNamespace(coordinator=coordinator, trials=SimpleNamespace(run=None)),
        consensus=SimpleNamespace(bans=dict),
    )
    no_command: JoinDocument = {"here": None, "elsewhere": None}
    view = StatusView(cast("Any", parts), [], Telemetry(lambda model: "tiny"), lambda serve: no_command, Path())
    peers = {each["peer_id"]: each for each in view.peers()}
    assert peers.keys() == {CONNECTED, HEARSAY, GONE}
    assert [peers[peer]["reached"] for peer in (CONNECTED, HEARSAY, GONE)] == [True, False, False]
    assert peers[GONE]["banned"] == {"left_s": 9.0, "reason": "garbage"}
    assert peers[CONNECTED]["banned"] is None
    assert peers[CONNECTED]["sessions"] == {
        "opened": 5,
        "refused": {"full": 3},
        "failed": {},
        "faults": 2,
        "held_sessions": 1,
        "held_positions": 64,
        "held_bytes": 4096,
    }
    (span,) = peers[CONNECTED]["spans"]
    assert (span["start"], span["end"], span["sessions"], span["queued_rows"]) == (0, 3, 2, 5)
    shown = peers[CONNECTED]["jobs"]
    assert shown is not None
    assert (shown["failed"], shown["lagged"], shown["avoided_s"]) == (1, 1, 12.0)
    assert peers[HEARSAY]["sessions"] is None
    assert view._peer_counts() == {
        "known": 2,
        "reached": 1,
        "banned": 1,
        "sessions_opened": 10,
        "sessions_refused": 6,
        "sessions_failed": 0,
        "sessions_held": 1,
        "held_bytes": 4096,
    }


def view_of_models(
    directory: Directory,
    known: Mapping[ModelId, Manifest],
    between: Links,
    named: Collection[ModelId] = (),
    data_dir: Path = Path(),
    placed: Sequence[Placement] = (),
    spans: Sequence[BlockRange] = (),
    twin: str | None = None,
) -> StatusView:
    """Return a view of a node that has the manifests of the models `known`, and names for those `named`."""
    heartbeats = SimpleNamespace(twin=lambda: twin)
    membership = SimpleNamespace(directory=directory, unreached_stages=lambda model, blocks: (), heartbeats=heartbeats)
    library = SimpleNamespace(
        name_of=lambda model: model[:8],
        local_models=lambda: tuple(known),
        local_manifest=known.get,
        named_models=lambda: set(named),
    )
    served = [SimpleNamespace(info=SimpleNamespace(model=MODEL, blocks=blocks)) for blocks in spans]
    client = SimpleNamespace(
        coordinator=None,
        trials=SimpleNamespace(run=None),
        links=SimpleNamespace(between=between),
        quality_store=SimpleNamespace(figures=lambda model: {}),
    )
    parts = SimpleNamespace(
        network=SimpleNamespace(network=SimpleNamespace(peer_id=US)),
        swarm=SimpleNamespace(
            membership=membership, placements=SimpleNamespace(current=lambda: AnnouncedPlacements(0, tuple(placed)))
        ),
        serving=SimpleNamespace(stages=SimpleNamespace(spans=lambda: served), library=library),
        client=client,
    )
    no_command: JoinDocument = {"here": None, "elsewhere": None}
    return StatusView(cast("Any", parts), [], Telemetry(lambda model: "tiny"), lambda serve: no_command, data_dir)


async def test_learning_counts_choices_whose_prediction_came_too_late(
    nursery: trio.Nursery, virtual_clock: MockClock
) -> None:
    async def never(context: TaskContext) -> Mapping[str, tuple[float, float]]:
        del context
        await trio.sleep_forever()
        raise AssertionError

    predictions = PredictionCache()
    view = view_of_models(Directory(own_peer=US, connected=list), {}, cast("Any", None))
    cast("Any", view)._parts.selection = SimpleNamespace(chooser=LearnedChooser(predictions, random.Random(1)))
    context, methods = TaskContext(architecture="fake"), [BASELINE, method(engine="fused")]
    await predictions.predict(context, methods)
    assert view.learning()["late_predictions"] == 0, "the heuristic is all that there is"
    predictions.set_predictor(never, 10)
    nursery.start_soon(predictions.run)
    await predictions.predict(context, methods)
    assert view.learning()["late_predictions"] == 1


async def test_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of_models(Directory(own_peer=US, connected=list), {}, cast("Any", None), data_dir=tmp_path / "data")
    free = MIN_FREE_BYTES
    monkeypatch.setattr("node.models.files.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert await view.problems() == []
    free -= 1
    [problem] = await view.problems()
    assert f"the disk of {tmp_path / 'data'} is full (63 MiB free)" in problem


async def test_another_node_with_our_key_is_a_problem(tmp_path: Path) -> None:
    view = view_of_models(Directory(own_peer=US), {}, cast("Any", None), data_dir=tmp_path, twin="another node")
    assert "another node" in await view.problems()


def announcing(peer: PeerId, *spans: tuple[ModelId, int, int]) -> Heartbeat:
    return replace(
        heartbeat(peer),
        spans=tuple(ServedSpan(model=model, blocks=BlockRange(start, end), load=LOAD) for model, start, end in spans),
    )


async def test_blocks_that_are_being_loaded_are_not_asked_for() -> None:
    directory = Directory(own_peer=US, connected=lambda: [CONNECTED])
    directory.update(announcing(CONNECTED, (MODEL, 0, 2), (MODEL, 6, 8)), 0.0)
    placed = [Placement(model=MODEL, blocks=BlockRange(3, 5), rate=1, movable=False)]

    def gaps(view: StatusView) -> list[tuple[int, int]]:
        return [(gap["start"], gap["end"]) for gap in view._gaps()]

    view = view_of_models(directory, {}, cast("Any", None), placed=placed)
    assert [each.blocks for each in view._loading()] == [BlockRange(3, 5)]
    assert gaps(view) == [(2, 3), (5, 6)]
    half = view_of_models(directory, {}, cast("Any", None), placed=placed, spans=[BlockRange(3, 4)])
    assert half._loading(), "its second device is not ready"
    on_two = [BlockRange(3, 4), BlockRange(4, 5)]
    assert not view_of_models(directory, {}, cast("Any", None), placed=placed, spans=on_two)._loading()


async def test_no_route_is_looked_for_of_models_that_are_not_known_here() -> None:
    """Strangers announce any number of spans of them: each look at the models would stop the daemon for seconds."""
    directory = Directory(own_peer=US, connected=lambda: [CONNECTED, GONE])
    directory.update(announcing(CONNECTED, (MODEL, 0, 3), (MODEL, 2, 4), (MODEL, 6, 8)), 0.0)
    directory.update(announcing(GONE, (MODEL, 3, 4)), 0.0)

    def between(a: str, b: str) -> Link:
        raise AssertionError((a, b))

    (document,) = (view := view_of_models(directory, {}, between)).models()
    assert document["coverage"] == [1, 1, 2, 2, 0, 0, 1, 1]
    assert (document["uncovered"], document["complete"], document["local"]) == ([(4, 6)], False, False)
    assert [(gap["start"], gap["end"], gap["serve"]) for gap in view._gaps()] == [(4, 6, f"{MODEL[:8]}:4-6")]


async def test_few_models_are_listed_that_are_not_known_here() -> None:
    peers = [peer_id_from_public_key(bytes([number]) * 32) for number in range(1, 11)]
    directory = Directory(own_peer=US, connected=lambda: peers)
    made_up = [ModelId(f"{number:064x}") for number in range(8 * 48)]
    for number, peer in enumerate(peers[:8]):
        directory.update(announcing(peer, *((model, 0, 1) for model in made_up[48 * number : 48 * number + 48])), 0.0)
    served = [ModelId("ff" * 32), ModelId("fe" * 32)]
    for peer in peers[8:]:
        spans = [(model, 2 * number, 2 * number + 1) for model in served for number in range(1, 24)]
        directory.update(announcing(peer, *spans), 1.0)
    view = view_of_models(directory, {}, lambda a, b: Link(round_trip_s=0.01, bytes_per_s=1e6))
    listed = [model["model"] for model in view.models()]
    assert set(served) < set(listed)
    assert len(listed) == MAX_OTHER_MODELS == len(set(listed))
    assert len(view._gaps()) <= MAX_GAPS


async def test_peers_cannot_choose_ids_that_push_out_honest_models() -> None:
    peers = [peer_id_from_public_key(bytes([number]) * 32) for number in range(1, 8)]
    directory = Directory(own_peer=US, connected=lambda: peers)
    for number, peer in enumerate(peers[:4]):  # each pair announces the same ones
        made_up = [ModelId(f"{48 * (number // 2) + index:064x}") for index in range(48)]
        directory.update(announcing(peer, *((model, 0, 1) for model in made_up)), 0.0)
    honest = [ModelId(f"{255 - number:x}" * 32) for number in range(48)]
    for peer in peers[4:6]:
        directory.update(announcing(peer, *((model, 0, 1) for model in honest)), 0.0)
    named = ModelId("ff" * 31 + "fe")
    directory.update(announcing(peers[6], (named, 0, 1)), 0.0)

    def listed() -> set[ModelId]:
        view = view_of_models(directory, {}, lambda a, b: Link(round_trip_s=0.01, bytes_per_s=1e6), {named})
        found = {ModelId(model["model"]) for model in view.models()}
        view._models_read_s = -math.inf
        assert found == {ModelId(model["model"]) for model in view.models()}, "the list of a node is stable"
        return found

    one, other = listed(), listed()
    assert len(one) == len(other) == MAX_OTHER_MODELS
    assert named in one & other
    assert one & set(honest)
    assert one != other, "peers could foresee it"


async def test_models_are_described_once_a_second(virtual_clock: object) -> None:
    directory = Directory(own_peer=US, connected=lambda: [CONNECTED])
    view = view_of_models(directory, {}, lambda a, b: Link(round_trip_s=0.01, bytes_per_s=1e6))
    assert view.models() == []
    directory.update(announcing(CONNECTED, (MODEL, 0, 3)), 0.0)
    assert view.models() == []
    await trio.sleep(1)
    assert [model["model"] for model in view.models()] == [MODEL]
