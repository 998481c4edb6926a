"""Checks of the swarm: reachability, bootstrap peers, clocks, versions, identities, and coverage of models."""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final

import trio

from node.config import APPLICATION, NodeConfig
from node.doctor.reach_checks import check_reach
from node.doctor.report import Consequence, Fault, Finding, RunningNode
from node.identity import KEY_FILE, IdentityError, load_or_create
from node.models.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.network.addresses import parse_peer_address
from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError
from node.network.probe_port import PortState, probe_port
from node.stages.memory_admission import node_bytes_for
from node.swarm.directory import Directory
from node.swarm.heartbeats import HEARTBEAT_INTERVAL_S
from node.swarm.link_estimates import LinkEstimates
from protocol.announcements import HEARTBEAT_TOPIC, Heartbeat
from protocol.errors import RemoteProtocolError
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.limits import MAX_CLOCK_SKEW_S
from protocol.records import issue_time, verify_record
from protocol.sync import PROTOCOL_ID as SYNC_PROTOCOL
from selector.cuts import Cuts
from selector.routing import NoRouteError, check_complete

OBSERVE_S: Final = 10.0
"""Longest wait for the first heartbeat."""

AFTER_FIRST_S: Final = 1.5 * HEARTBEAT_INTERVAL_S
"""Wait after the first heartbeat, in which every other peer has sent one, too."""

CLOCK_TOLERANCE_S: Final = MAX_CLOCK_SKEW_S / 2
"""Half of the skew that peers accept: heartbeats take seconds, and clocks drift on."""

MISMATCH: Final = "does not correspond"
"""Part of the library's error where another peer answers than the one dialled."""

_BOOTSTRAP_FAULTS: Final[Mapping[PortState, tuple[Fault, str]]] = {
    PortState.CLOSED: (
        Fault.CLOSED_PORT,
        "connection refused: the node is down, its port is another one, or a firewall refuses",
    ),
    PortState.UNREACHABLE: (
        Fault.BOOTSTRAP_DEAD,
        "no answer: the machine is down, has another address, or a firewall drops packets to the port",
    ),
    PortState.SILENT: (Fault.BOOTSTRAP_DEAD, "accepts connections and sends nothing: the process is stopped or hangs"),
    PortState.FOREIGN: (Fault.WRONG_PEER, "another program answers there, not a node"),
    PortState.PRIVATE: (Fault.WRONG_SWARM_KEY, "is in a private swarm: give its key with --swarm-key"),
    PortState.OPEN: (
        Fault.WRONG_SWARM_KEY,
        "is in the open swarm, and this node has a swarm key: leave out --swarm-key, or use another peer",
    ),
}


@dataclass(slots=True)
class _Observed:
    """Heartbeats and dials of some seconds in the swarm."""

    directory: Directory
    skews_s: dict[PeerId, float] = field(default_factory=dict)
    """How far our clock is ahead of a peer's."""
    heartbeats: dict[PeerId, Heartbeat] = field(default_factory=dict)
    malformed: dict[PeerId, str] = field(default_factory=dict)
    """Faults in heartbeats, by the neighbour that sent them."""
    connected: set[PeerId] = field(default_factory=set)
    failed: dict[PeerId, str] = field(default_factory=dict)
    """Errors of dials."""
    other_protocols: dict[PeerId, str] = field(default_factory=dict)
    """Connected peers that do not speak our protocols."""
    first_heartbeat: trio.Event = field(default_factory=trio.Event)

    def on_heartbeat(self, source: PeerId, data: bytes, now_s: float) -> bool:
        """Take in a heartbeat, whatever its time, and do not forward it."""
        try:
            issued_at_s = issue_time(data, Heartbeat.kind)
            heartbeat = verify_record(Heartbeat, data, issued_at_s)
        except RemoteProtocolError as error:
            self.malformed[source] = str(error)
            return False
        self.skews_s[heartbeat.peer] = now_s - issued_at_s - 0.5  # the time is in whole seconds
        self.heartbeats[heartbeat.peer] = heartbeat
        self.directory.update(heartbeat, 0.0, dialled=True)  # coverage counts every peer, dialled or not
        self.first_heartbeat.set()
        return False


class SwarmChecks:
    """The checks that need the network. `peers` and `complete_models` are results besides the findings."""

    def __init__(self, config: NodeConfig, running: RunningNode | None, wall_clock: Callable[[], float]) -> None:
        self.peers: tuple[PeerId, ...] = ()
        self.complete_models: tuple[str, ...] = ()
        self._config = config
        self._running = running
        self._own: Sequence[str] = running.status["multiaddrs"] if running else ()
        self._wall_clock = wall_clock

    async def run(self) -> list[Finding]:
        """Run all of them."""
        findings = [] if self._running is None else [each async for each in check_reach(self._config, self._running)]
        if not self._config.bootstrap:
            if self._running is None or not self._running.status["connected_peers"]:
                message = "no bootstrap peer is given (--bootstrap), so only peers that dial this node can find it"
                findings.append(Finding(Fault.NO_BOOTSTRAP, Consequence.JOIN, message, grave=False))
            if not self._own:
                return findings
        usable, faults = await self._probe_bootstrap()
        seen = await self._observe([*usable, *self._own])
        own = set() if self._running is None else {self._running.status["peer_id"]}
        self.peers = tuple(sorted((seen.connected | seen.heartbeats.keys()) - own))
        checks = (_check_clock(seen), _check_versions(seen), self._check_identity(seen), self._check_models(seen))
        return [*findings, *faults, *self._check_dials(usable, seen), *(each for check in checks for each in check)]

    async def _probe_bootstrap(self) -> tuple[list[str], list[Finding]]:
        """Return the bootstrap addresses where a libp2p host of this swarm answers, and findings for the others."""
        answers: dict[str, PortState] = {}

        async def probe(multiaddr: str) -> None:
            try:
                answers[multiaddr] = await probe_port(parse_peer_address(multiaddr)[1])
            except (ValueError, NetworkError):
                answers[multiaddr] = PortState.UNREACHABLE

        async with trio.open_nursery() as nursery:
            for multiaddr in self._config.bootstrap:
                nursery.start_soon(probe, multiaddr)
        ours = PortState.OPEN if self._config.swarm_key is None else PortState.PRIVATE
        usable = [multiaddr for multiaddr in self._config.bootstrap if answers[multiaddr] is ours]
        findings = []
        for multiaddr in self._config.bootstrap:
            if multiaddr not in usable:
                fault, message = _BOOTSTRAP_FAULTS[answers[multiaddr]]
                message = f"bootstrap peer {multiaddr}: {message}"
                findings.append(Finding(fault, Consequence.JOIN, message, grave=not usable))
        return usable, findings

    async def _observe(self, multiaddrs: Sequence[str]) -> _Observed:
        """Dial peers and receive heartbeats for some seconds."""
        network = Libp2pNetwork(os.urandom(32), listen=(), swarm_key=self._config.swarm_key)
        seen = _Observed(Directory(own_peer=network.peer_id))
        network.join_topic(HEARTBEAT_TOPIC, lambda source, data: seen.on_heartbeat(source, data, self._wall_clock()))

        async def dial(multiaddr: str) -> None:
            peer = parse_peer_address(multiaddr)[0]
            try:
                await network.connect(multiaddr)
            except (NetworkError, ValueError) as error:
                seen.failed[peer] = str(error)
                return
            seen.connected.add(peer)
            try:
                stream = await network.open_stream(peer, SYNC_PROTOCOL)
            except NetworkError as error:
                seen.other_protocols[peer] = str(error)
            else:
                await stream.aclose()

        async with network.running():
            async with trio.open_nursery() as nursery:
                for multiaddr in multiaddrs:
                    if "/p2p-circuit" not in multiaddr:
                        nursery.start_soon(dial, multiaddr)
            if seen.connected:
                with trio.move_on_after(OBSERVE_S):
                    await seen.first_heartbeat.wait()
                    await trio.sleep(AFTER_FIRST_S)
        return seen

    def _check_dials(self, usable: Sequence[str], seen: _Observed) -> Iterator[Finding]:
        """Check that peers whose ports answered as ours completed the handshake."""
        dialled = {multiaddr: parse_peer_address(multiaddr)[0] for multiaddr in usable}
        all_failed = seen.connected.isdisjoint(dialled.values())
        for multiaddr, peer in dialled.items():
            if peer in seen.connected:
                continue
            reason = seen.failed.get(peer, "no answer")
            if self._config.swarm_key is not None and MISMATCH not in reason:
                fault, message = Fault.WRONG_SWARM_KEY, "its swarm has another key than the one in --swarm-key"
            else:
                fault = Fault.WRONG_PEER
                message = f"another peer answers there ({reason}): ask for its present address"
            yield Finding(fault, Consequence.JOIN, f"bootstrap peer {multiaddr}: {message}", grave=all_failed)

    def _check_identity(self, seen: _Observed) -> Iterator[Finding]:
        """Check that no other node uses this node's key."""
        key = self._config.data_dir / KEY_FILE
        if not key.exists():
            return
        with suppress(IdentityError):
            peer = load_or_create(self._config.data_dir).peer_id
            other = seen.heartbeats.get(peer)
            if other is not None and set(other.multiaddrs).isdisjoint(self._own):
                where = ", ".join(other.multiaddrs) or "an unknown address"
                message = (
                    f"another node uses this node's identity {peer}, at {where}: {key} was copied; "
                    f"stop that node, or remove the file to get a new identity"
                )
                yield Finding(Fault.NAME_TAKEN, Consequence.JOIN, message)

    def _check_models(self, seen: _Observed) -> Iterator[Finding]:
        """Check that every block of the known models is served."""
        store = ModelStore(self._config.cache_dir)
        incomplete: list[tuple[str, Manifest | None, Sequence[BlockRange]]] = []
        complete: list[str] = []
        if self._running is not None:
            for model in self._running.models:
                name = model["name"]
                if model["uncovered"] and any(model["coverage"]):
                    gaps = [BlockRange(*gap) for gap in model["uncovered"]]
                    incomplete.append((name, _manifest_in(store, ModelId(model["model"])), gaps))
                elif model["apart"]:
                    yield _apart(name, model["apart"])
                elif model["complete"]:
                    complete.append(name)
        else:
            for model_id, spans in self._served_spans(store, seen).items():
                manifest = _manifest_in(store, model_id)
                cuts = manifest.cuts if manifest else Cuts(max(span.end for span in spans))
                name = store.name_of(model_id)
                if missing := cuts.uncovered(spans):
                    incomplete.append((name, manifest, missing))
                elif apart := _peers_apart(seen.directory, model_id, cuts):
                    yield _apart(name, apart)
                elif manifest is not None:
                    complete.append(name)
        self.complete_models = tuple(complete)
        for name, manifest, ranges in incomplete:
            missing_text = ", ".join(map(str, ranges))
            options = [f"--serve {name}:{blocks}" for blocks in ranges]
            if manifest is not None:
                options.append(f"and --memory {node_bytes_for(manifest, ranges) >> 20}MiB or more")
            message = f"no peer serves blocks {missing_text} of {name}: start a node with {' '.join(options)}"
            yield Finding(Fault.MISSING_BLOCK, Consequence.MODEL, message)

    def _served_spans(self, store: ModelStore, seen: _Observed) -> dict[ModelId, list[BlockRange]]:
        """Return the spans that peers serve, and those that this node will."""
        spans: dict[ModelId, list[BlockRange]] = {}
        for model in seen.directory.models():
            spans[model] = [each.stage.blocks for each in seen.directory.candidates(model)]
        for spec in self._config.serve:
            with suppress(ModelError):
                model = store.resolve(spec.model, spans)
                if spec.blocks is not None and model in spans:
                    spans[model].append(spec.blocks)
        return spans


def _peers_apart(directory: Directory, model: ModelId, cuts: Cuts) -> Sequence[tuple[str, str]]:
    """Return the pairs of peers that keep a model from having a route; none where it has one."""
    links = LinkEstimates(directory, PeerId(""), lambda peer: None, lambda peer: None)
    try:
        check_complete(cuts, [each.stage for each in directory.candidates(model)], links.between)
    except NoRouteError as error:
        return error.apart
    return ()


def _apart(name: str, pairs: Sequence[tuple[str, str]]) -> Finding:
    named = ", ".join(f"{a} and {b}" for a, b in pairs[:3])
    message = (
        f"every block of {name} is announced, but by peers that have not reached each other ({named}): one of each "
        "pair needs a forwarded port or a relay, or others serve the same blocks"
    )
    return Finding(Fault.PEERS_APART, Consequence.MODEL, message)


def _manifest_in(store: ModelStore, model: ModelId) -> Manifest | None:
    with suppress(ModelError):
        if (package := store.find(model)) is not None:
            return package.manifest
    return None


def _check_clock(seen: _Observed) -> Iterator[Finding]:
    if not seen.skews_s:
        return
    ahead_s, peers = statistics.median(seen.skews_s.values()), len(seen.skews_s)
    if abs(ahead_s) > CLOCK_TOLERANCE_S:
        message = (
            f"this machine's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} "
            f"{'that of the peer seen' if peers == 1 else f'those of the {peers} peers seen'}, which accept at most "
            f"{MAX_CLOCK_SKEW_S} s: set the clock"
        )
        yield Finding(Fault.CLOCK_OFF, Consequence.JOIN, message)
        return
    for peer, skew_s in seen.skews_s.items():
        if abs(skew_s) > CLOCK_TOLERANCE_S:
            message = f"the clock of peer {peer} is {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead'}"
            yield Finding(Fault.CLOCK_OFF, Consequence.JOIN, message, grave=False)


def _check_versions(seen: _Observed) -> Iterator[Finding]:
    """Check that peers speak our version of protocols and records."""
    apart = {**seen.malformed, **seen.other_protocols}
    alone = seen.connected <= apart.keys() and not seen.heartbeats
    for peer, reason in apart.items():
        message = f"peer {peer} speaks another version of metaswarm, or none ({reason}): upgrade the older of the two"
        yield Finding(Fault.VERSION_APART, Consequence.JOIN, message, grave=alone)
    own_agent = f"{APPLICATION}/{version(APPLICATION)}"
    for peer, heartbeat in seen.heartbeats.items():
        if _release(heartbeat.agent) != _release(own_agent) and peer not in apart:
            message = f"peer {peer} runs {heartbeat.agent}, this node {own_agent}"
            yield Finding(Fault.VERSION_APART, Consequence.JOIN, message, grave=False)


def _release(agent: str) -> str:
    """Return program, major and minor version of an agent: equal ones are compatible."""
    return ".".join(agent.split(".")[:2])
