"""Why a node cannot start, join, be reached or serve, and why a model is incomplete: one line for each reason.

The doctor takes the configuration that the node has. It looks at what the node would use (directory, ports, files,
memory), greets the bootstrap peers as a stranger does, and joins the swarm for some seconds as a peer of its own that
serves nothing, to hear what everybody hears. It changes nothing and works beside a running node.
"""

import fcntl
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil
import trio

from node.api.interface import ModelStatus, NodeStatus
from node.config import APPLICATION, LOCK_FILE, MEMORY_SHARE, NodeConfig, ServeSpec
from node.engine.device import DeviceError, find_device
from node.identity import KEY_FILE, IdentityError, load_or_create
from node.models.errors import ModelError
from node.models.store import ModelStore, Package, UnknownModelError
from node.network.addresses import TcpAddress, is_private, parse_address, parse_peer_address
from node.network.host import Libp2pNetwork
from node.network.interface import NetworkError
from node.network.probe_port import PortState, probe_port
from node.network.transport import bind
from node.storage.database import DATABASE_FILE, StorageError, find_damage
from node.swarm.directory import Directory
from node.swarm.membership import HEARTBEAT_INTERVAL_S
from protocol.announcements import HEARTBEAT_TOPIC, Heartbeat
from protocol.errors import RemoteProtocolError
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.limits import MAX_CLOCK_SKEW_S
from protocol.records import issue_time, unseal
from protocol.sync import PROTOCOL_ID as SYNC_PROTOCOL
from selector.routing import uncovered

LISTEN_S: Final = 10.0
"""How long the doctor listens to the swarm at most."""

AFTER_FIRST_S: Final = 1.5 * HEARTBEAT_INTERVAL_S
"""After the first heartbeat, by when everybody else has sent one, too."""

CLOCK_TOLERANCE_S: Final = MAX_CLOCK_SKEW_S / 2
"""Peers refuse what is off by more than all of it. Heartbeats take seconds, and clocks drift on."""

MIN_FREE_BYTES: Final = 64 << 20

MISMATCH: Final = "does not correspond"
"""What the library says where another peer answers than the one dialled."""


class Fault(StrEnum):
    """What is wrong, for programs."""

    NAME_TAKEN = "name-taken"
    CORRUPT_FILE = "corrupt-file"
    NO_DEVICE = "no-device"
    NO_MEMORY = "no-memory"
    DISK_FULL = "disk-full"
    NO_BOOTSTRAP = "no-bootstrap"
    BOOTSTRAP_DEAD = "bootstrap-dead"
    CLOSED_PORT = "closed-port"
    WRONG_SWARM_KEY = "wrong-swarm-key"
    WRONG_PEER = "wrong-peer"
    VERSION_APART = "version-apart"
    CLOCK_OFF = "clock-off"
    RELAY_ONLY = "relay-only"
    MISSING_BLOCK = "missing-block"
    UNKNOWN_MODEL = "unknown-model"


class Consequence(StrEnum):
    """What does not work because of it, the most fundamental first."""

    START = "cannot start"
    JOIN = "cannot join"
    REACH = "cannot be reached"
    SERVE = "cannot serve"
    MODEL = "model incomplete"


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason. `grave`: what the consequence says is so; otherwise it works all the same."""

    fault: Fault
    consequence: Consequence
    message: str
    grave: bool = True

    def __str__(self) -> str:
        return f"{self.consequence}: {self.message}" if self.grave else f"note: {self.message}"


@dataclass(slots=True)
class Diagnosis:
    """What was found."""

    running: bool
    """Whether a node runs in the data directory."""
    findings: list[Finding] = field(default_factory=list)
    peers: tuple[PeerId, ...] = ()
    """Peers that were dialled or heard."""
    complete_models: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing grave was found."""
        return not any(finding.grave for finding in self.findings)

    def add(self, fault: Fault, consequence: Consequence, message: str, *, grave: bool = True) -> None:
        """Note a reason."""
        self.findings.append(Finding(fault, consequence, message, grave))


@dataclass(frozen=True, slots=True)
class RunningNode:
    """What a running node says of itself and of the models that it knows."""

    status: NodeStatus
    models: Sequence[ModelStatus]


async def diagnose(
    config: NodeConfig, running: RunningNode | None = None, *, wall_clock: Callable[[], float] = time.time
) -> Diagnosis:
    """Find out what is wrong. `running`: the node that answers at the data directory's API, if one does."""
    found = Diagnosis(running=running is not None)
    _check_data_dir(config, found)
    free_bytes = await _free_bytes(config, found)
    await trio.to_thread.run_sync(_check_files, config, free_bytes, running, found)
    if running is None:
        await _check_ports(config, found)
    await _check_swarm(config, running, found, wall_clock)
    order = list(Consequence)
    found.findings.sort(key=lambda finding: (not finding.grave, order.index(finding.consequence)))
    return found


# What lies on this machine


def _check_data_dir(config: NodeConfig, found: Diagnosis) -> None:
    folder = config.data_dir
    if not folder.exists():
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        found.add(Fault.NAME_TAKEN, Consequence.START, f"{folder} belongs to somebody else: choose another --data-dir")
        return
    if not found.running and _is_locked(folder / LOCK_FILE):
        found.add(
            Fault.NAME_TAKEN,
            Consequence.START,
            f"another node uses {folder} and its API does not answer: stop it, or choose another --data-dir",
        )
    free_bytes = psutil.disk_usage(str(folder)).free
    if free_bytes < MIN_FREE_BYTES:
        message = f"the disk of {folder} is full ({free_bytes >> 20} MiB free): history cannot be kept; free some space"
        found.add(Fault.DISK_FULL, Consequence.SERVE, message)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


async def _free_bytes(config: NodeConfig, found: Diagnosis) -> int:
    """Return how much memory is free where the node would compute."""
    try:
        return (await find_device(config.device)).free_bytes
    except DeviceError as error:
        message = f"cannot compute on {config.device}: {error}; see --device"
        found.add(Fault.NO_DEVICE, Consequence.START, message)
        return psutil.virtual_memory().available


def _check_files(config: NodeConfig, free_bytes: int, running: RunningNode | None, found: Diagnosis) -> None:
    """Look at key, database and model files; hashes what is to be served, so it may take a while."""
    if (config.data_dir / KEY_FILE).exists():
        try:
            load_or_create(config.data_dir)
        except IdentityError as error:
            found.add(Fault.CORRUPT_FILE, Consequence.START, str(error))
    database = config.data_dir / DATABASE_FILE
    try:
        damage = find_damage(database)
    except (StorageError, OSError) as error:
        damage = str(error)
    if damage is not None:
        message = f"{database} is damaged ({damage}): restart the node, which sets it aside and asks the swarm again"
        found.add(Fault.CORRUPT_FILE, Consequence.SERVE, message)
    store = ModelStore(config.cache_dir)
    heard = [ModelId(model["model"]) for model in running.models] if running else []
    for spec in config.serve:
        _check_span(spec, store, heard, config, free_bytes, running, found)


def _check_span(
    spec: ServeSpec,
    store: ModelStore,
    heard: Iterable[ModelId],
    config: NodeConfig,
    free_bytes: int,
    running: RunningNode | None,
    found: Diagnosis,
) -> None:
    try:
        package = store.find(store.resolve(spec.model, heard))
    except UnknownModelError as error:
        found.add(Fault.UNKNOWN_MODEL, Consequence.SERVE, str(error))
        return
    except ModelError as error:
        found.add(Fault.CORRUPT_FILE, Consequence.SERVE, str(error))
        return
    if package is None:
        return  # the node fetches it when it starts
    whole = BlockRange(0, package.manifest.block_count)
    if spec.blocks is not None and spec.blocks.end > whole.end:
        found.add(Fault.MISSING_BLOCK, Consequence.START, f"cannot serve {spec}: the model has blocks {whole}")
        return
    try:
        # Where the node chooses its blocks itself, every file that is here may be among them.
        files = store.verify(package.model_id, spec.blocks)
    except ModelError as error:
        found.add(Fault.CORRUPT_FILE, Consequence.SERVE, str(error))
        return
    for name in files.corrupt:
        message = (
            f"{package.path / name} does not match its hash: the node fetches it again from peers; where none has it, "
            f"import the model again"
        )
        found.add(Fault.CORRUPT_FILE, Consequence.SERVE, message)
    served = running is not None and any(span["model"] == package.model_id for span in running.status["spans"])
    if not served:
        _check_memory(spec, package, config, free_bytes, found)


def _check_memory(spec: ServeSpec, package: Package, config: NodeConfig, free_bytes: int, found: Diagnosis) -> None:
    smallest = spec.blocks or BlockRange(0, 1)
    needed_bytes = package.manifest.bytes_of(smallest)
    budget_bytes = config.memory_bytes or int(free_bytes * MEMORY_SHARE)
    if needed_bytes > budget_bytes // len(config.serve):
        where = "--memory allows" if config.memory_bytes else "are free"
        found.add(
            Fault.NO_MEMORY,
            Consequence.SERVE,
            f"blocks {smallest} of {spec.model} weigh {needed_bytes >> 20} MiB and {budget_bytes >> 20} MiB {where}"
            f"{' for all that is served' if len(config.serve) > 1 else ''}: serve fewer blocks, or give it more memory",
        )


async def _check_ports(config: NodeConfig, found: Diagnosis) -> None:
    """See whether the ports that the node wants are to be had."""
    wanted = [(f"--listen {text}", parse_address(text)) for text in config.listen]
    kind = "ip6" if ":" in config.api_host else "ip4"
    if config.api_host != "localhost":
        api = TcpAddress(kind, config.api_host, config.api_port, None)
        wanted.append((f"--api {config.api_host}:{config.api_port}", api))
    for what, address in wanted:
        try:
            for listener in await bind(address):
                await listener.aclose()
        except NetworkError as error:
            found.add(Fault.NAME_TAKEN, Consequence.START, f"{what}: {error}: choose another port")


# What the swarm says


@dataclass(slots=True)
class _Swarm:
    """What was heard in some seconds of listening."""

    directory: Directory
    skews_s: dict[PeerId, float] = field(default_factory=dict)
    """By how much our clock is ahead of a peer's."""
    agents: dict[PeerId, str] = field(default_factory=dict)
    addresses: dict[PeerId, tuple[str, ...]] = field(default_factory=dict)
    unreadable: dict[PeerId, str] = field(default_factory=dict)
    connected: set[PeerId] = field(default_factory=set)
    undialled: dict[PeerId, str] = field(default_factory=dict)
    strange: dict[PeerId, str] = field(default_factory=dict)
    """Peers that were dialled and do not speak our protocols."""
    first_heard: trio.Event = field(default_factory=trio.Event)

    def hear(self, source: PeerId, data: bytes, now_s: float) -> bool:
        """Take in a heartbeat however wrong its time is. What the doctor hears it does not forward."""
        try:
            issued_at_s = issue_time(data, Heartbeat.kind)
            heartbeat = unseal(Heartbeat, data, issued_at_s)
        except RemoteProtocolError as error:
            self.unreadable[source] = str(error)
            return False
        self.skews_s[heartbeat.peer] = now_s - issued_at_s - 0.5  # of the second that its clock was in
        self.agents[heartbeat.peer] = heartbeat.agent
        self.addresses[heartbeat.peer] = heartbeat.multiaddrs
        self.directory.hear(heartbeat, 0.0, dialled=True)  # it judges what is said, whoever it is
        self.first_heard.set()
        return False


async def _check_swarm(
    config: NodeConfig, running: RunningNode | None, found: Diagnosis, wall_clock: Callable[[], float]
) -> None:
    own = running.status["multiaddrs"] if running else []
    if running is not None:
        await _check_reach(own, found)
    if not config.bootstrap:
        if running is None or not running.status["connected_peers"]:
            message = "no bootstrap peer is given (--bootstrap), so that only peers which dial this node can meet it"
            found.add(Fault.NO_BOOTSTRAP, Consequence.JOIN, message, grave=False)
        if not own:
            return
    usable = await _greet_bootstrap(config, found)
    swarm = await _listen([*usable, *own], config.swarm_key, wall_clock)
    found.peers = tuple(sorted(swarm.connected | swarm.agents.keys()))
    _judge_dials(config, usable, swarm, found)
    _judge_clock(swarm, found)
    _judge_versions(swarm, found)
    _judge_identity(config, own, swarm, found)
    _judge_models(config, running, swarm, found)


async def _check_reach(own: Sequence[str], found: Diagnosis) -> None:
    """See by which way others come to a running node."""
    direct = [address for address in own if "/p2p-circuit" not in address]
    if not direct:
        message = (
            "others come to this node through relays only, which is slow and carries little: open or forward its TCP "
            "port (--listen) where you can"
            if own
            else "this node has no address that others could dial: see --listen"
        )
        found.add(Fault.RELAY_ONLY, Consequence.REACH, message)
        return
    answers = {address: await probe_port(parse_peer_address(address)[1]) for address in direct}
    closed = [address for address, answer in answers.items() if answer not in {PortState.OPEN, PortState.PRIVATE}]
    if len(closed) == len(direct):
        message = (
            f"nothing answers at {closed[0]}, which this node tells others to dial ({answers[closed[0]]}): "
            f"open the port in the firewall, or listen on another address"
        )
        found.add(Fault.CLOSED_PORT, Consequence.REACH, message)
    elif all(is_private(parse_peer_address(address)[1].host) for address in direct):
        message = "only machines of the same network can dial this node, whose addresses are all private"
        found.add(Fault.CLOSED_PORT, Consequence.REACH, message, grave=False)


async def _greet_bootstrap(config: NodeConfig, found: Diagnosis) -> list[str]:
    """Return the bootstrap addresses that a libp2p host of this swarm may be behind; say what is behind the others."""
    answers: dict[str, PortState] = {}

    async def ask(multiaddr: str) -> None:
        try:
            answers[multiaddr] = await probe_port(parse_peer_address(multiaddr)[1])
        except ValueError:
            answers[multiaddr] = PortState.UNREACHABLE

    async with trio.open_nursery() as nursery:
        for multiaddr in config.bootstrap:
            nursery.start_soon(ask, multiaddr)
    ours = PortState.OPEN if config.swarm_key is None else PortState.PRIVATE
    usable = [multiaddr for multiaddr in config.bootstrap if answers[multiaddr] is ours]
    for multiaddr in config.bootstrap:
        if multiaddr not in usable:
            fault, message = _unusable(multiaddr, answers[multiaddr])
            found.add(fault, Consequence.JOIN, message, grave=not usable)
    return usable


def _unusable(multiaddr: str, answer: PortState) -> tuple[Fault, str]:
    match answer:
        case PortState.CLOSED:
            what = "nothing listens there: the node is down, its port is another one, or a firewall refuses"
            return Fault.CLOSED_PORT, f"bootstrap peer {multiaddr}: {what}"
        case PortState.UNREACHABLE:
            what = "no answer: the machine is down, has another address, or a firewall drops what is sent to the port"
            return Fault.BOOTSTRAP_DEAD, f"bootstrap peer {multiaddr}: {what}"
        case PortState.SILENT:
            what = "it accepts connections and says nothing: the process is stopped or hangs"
            return Fault.BOOTSTRAP_DEAD, f"bootstrap peer {multiaddr}: {what}"
        case PortState.FOREIGN:
            return Fault.WRONG_PEER, f"bootstrap peer {multiaddr}: another program answers there, no node"
        case PortState.PRIVATE:
            what = "it is in a private swarm: give its key with --swarm-key"
            return Fault.WRONG_SWARM_KEY, f"bootstrap peer {multiaddr}: {what}"
        case PortState.OPEN:
            what = "it is in the open swarm, and this node has a swarm key: leave --swarm-key away, or ask another peer"
            return Fault.WRONG_SWARM_KEY, f"bootstrap peer {multiaddr}: {what}"


async def _listen(multiaddrs: Sequence[str], swarm_key: str | None, wall_clock: Callable[[], float]) -> _Swarm:
    """Dial peers and hear what the swarm says, for some seconds."""
    network = Libp2pNetwork(os.urandom(32), listen=(), swarm_key=swarm_key)
    swarm = _Swarm(Directory(own_peer=network.peer_id))
    network.join_topic(HEARTBEAT_TOPIC, lambda source, data: swarm.hear(source, data, wall_clock()))

    async def meet(multiaddr: str) -> None:
        peer = parse_peer_address(multiaddr)[0]
        try:
            await network.connect(multiaddr)
        except (NetworkError, ValueError) as error:
            swarm.undialled[peer] = str(error)
            return
        swarm.connected.add(peer)
        try:
            stream = await network.open_stream(peer, SYNC_PROTOCOL)
        except NetworkError as error:
            swarm.strange[peer] = str(error)
        else:
            await stream.aclose()

    async with network.running():
        async with trio.open_nursery() as nursery:
            for multiaddr in multiaddrs:
                if "/p2p-circuit" not in multiaddr:
                    nursery.start_soon(meet, multiaddr)
        if swarm.connected:
            with trio.move_on_after(LISTEN_S):
                await swarm.first_heard.wait()
                await trio.sleep(AFTER_FIRST_S)
    return swarm


def _judge_dials(config: NodeConfig, usable: Sequence[str], swarm: _Swarm, found: Diagnosis) -> None:
    """Say why peers that greeted us as one of ours would not go on."""
    dialled = {multiaddr: parse_peer_address(multiaddr)[0] for multiaddr in usable}
    nobody = not swarm.connected.intersection(dialled.values())
    for multiaddr, peer in dialled.items():
        if peer in swarm.connected:
            continue
        reason = swarm.undialled.get(peer, "no answer")
        if config.swarm_key is not None and MISMATCH not in reason:
            message = f"bootstrap peer {multiaddr}: its swarm has another key than the one in --swarm-key"
            found.add(Fault.WRONG_SWARM_KEY, Consequence.JOIN, message, grave=nobody)
        else:
            message = f"bootstrap peer {multiaddr}: another peer answers there ({reason}): ask for its present address"
            found.add(Fault.WRONG_PEER, Consequence.JOIN, message, grave=nobody)


def _judge_clock(swarm: _Swarm, found: Diagnosis) -> None:
    if not swarm.skews_s:
        return
    ahead_s = statistics.median(swarm.skews_s.values())
    if abs(ahead_s) > CLOCK_TOLERANCE_S:
        message = (
            f"this machine's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} "
            f"{_peers(len(swarm.skews_s))}, which take what is at most {MAX_CLOCK_SKEW_S} s off: set the clock"
        )
        found.add(Fault.CLOCK_OFF, Consequence.JOIN, message)
        return
    for peer, skew_s in swarm.skews_s.items():
        if abs(skew_s) > CLOCK_TOLERANCE_S:
            message = f"the clock of peer {peer} is {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead'}"
            found.add(Fault.CLOCK_OFF, Consequence.JOIN, message, grave=False)


def _judge_versions(swarm: _Swarm, found: Diagnosis) -> None:
    """Say who speaks another version of our protocols, or of our records."""
    apart = {**swarm.unreadable, **swarm.strange}
    alone = swarm.connected <= apart.keys() and not swarm.agents
    for peer, reason in apart.items():
        message = f"peer {peer} speaks another version of metaswarm, or none ({reason}): upgrade the older of the two"
        found.add(Fault.VERSION_APART, Consequence.JOIN, message, grave=alone)
    ours = _release(f"{APPLICATION}/{version(APPLICATION)}")
    for peer, agent in swarm.agents.items():
        if _release(agent) != ours and peer not in apart:
            message = f"peer {peer} runs {agent}, this node {APPLICATION}/{version(APPLICATION)}"
            found.add(Fault.VERSION_APART, Consequence.JOIN, message, grave=False)


def _release(agent: str) -> str:
    """Return program, major and minor version of an agent: what is the same up to there works together."""
    return ".".join(agent.split(".")[:2])


def _judge_identity(config: NodeConfig, own: Sequence[str], swarm: _Swarm, found: Diagnosis) -> None:
    """See whether somebody else is there under this node's name."""
    if not (config.data_dir / KEY_FILE).exists():
        return
    try:
        peer = load_or_create(config.data_dir).peer_id
    except IdentityError:
        return
    said = swarm.addresses.get(peer)
    if said is not None and set(said).isdisjoint(own):
        message = (
            f"another node uses this node's identity {peer}, at {', '.join(said) or 'an unknown address'}: "
            f"{config.data_dir / KEY_FILE} was copied; stop that node, or remove the file to get a new identity"
        )
        found.add(Fault.NAME_TAKEN, Consequence.JOIN, message)


def _judge_models(config: NodeConfig, running: RunningNode | None, swarm: _Swarm, found: Diagnosis) -> None:
    """Say which blocks of a model nobody serves."""
    incomplete: dict[ModelId, tuple[str, Sequence[BlockRange]]] = {}
    complete: list[str] = []
    if running is not None:
        for model in running.models:
            name = model["name"] or model["model"][:12]
            if model["uncovered"] and any(model["coverage"]):
                incomplete[ModelId(model["model"])] = (name, [BlockRange(*gap) for gap in model["uncovered"]])
            elif model["complete"]:
                complete.append(name)
    else:
        store = ModelStore(config.cache_dir)
        for model_id, spans in _heard_spans(config, store, swarm).items():
            package = store.find(model_id)
            block_count = package.manifest.block_count if package else max(span.end for span in spans)
            name = store.name_of(model_id) or model_id[:12]
            if missing := uncovered(block_count, spans):
                incomplete[model_id] = (name, missing)
            elif package is not None:
                complete.append(name)
    found.complete_models = tuple(complete)
    for name, ranges in incomplete.values():
        missing_text = ", ".join(map(str, ranges))
        serve = " ".join(f"--serve {name}:{blocks}" for blocks in ranges)
        message = f"nobody serves blocks {missing_text} of {name}: start a node with {serve}"
        found.add(Fault.MISSING_BLOCK, Consequence.MODEL, message)


def _heard_spans(config: NodeConfig, store: ModelStore, swarm: _Swarm) -> dict[ModelId, list[BlockRange]]:
    """Return the spans that peers serve, and those that this node will."""
    spans: dict[ModelId, list[BlockRange]] = {}
    for model in swarm.directory.models():
        spans[model] = [candidate.stage.blocks for candidate in swarm.directory.candidates(model)]
    for spec in config.serve:
        with suppress(ModelError):
            model = store.resolve(spec.model, spans)
            if spec.blocks is not None and model in spans:
                spans[model].append(spec.blocks)
    return spans


def _peers(count: int) -> str:
    return "the peer heard" if count == 1 else f"the {count} peers heard"
