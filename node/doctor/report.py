"""The report of a diagnosis: findings, each with a machine-readable fault and one line for people."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from node.api.interface import ModelDocument, NodeStatus
from protocol.identity import PeerId


class Fault(StrEnum):
    """What is wrong, for programs."""

    NAME_TAKEN = "name-taken"
    CORRUPT_FILE = "corrupt-file"
    NO_DEVICE = "no-device"
    NO_LLAMACPP = "no-llamacpp"
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
    PRIVATE_ONLY = "private-only"
    NO_RELAY = "no-relay"
    SYMMETRIC_NAT = "symmetric-nat"
    FIREWALL = "firewall"
    IPV6_BROKEN = "ipv6-broken"
    PEERS_APART = "peers-apart"
    MISSING_BLOCK = "missing-block"
    UNKNOWN_MODEL = "unknown-model"


class Consequence(StrEnum):
    """What fails because of it, the most fundamental first."""

    START = "cannot start"
    JOIN = "cannot join"
    REACH = "cannot be reached"
    SERVE = "cannot serve"
    MODEL = "model incomplete"


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason. A finding that is not `grave` is a note: the consequence does not hold."""

    fault: Fault
    consequence: Consequence
    message: str
    grave: bool = True

    def __str__(self) -> str:
        return f"{self.consequence}: {self.message}" if self.grave else f"note: {self.message}"


@dataclass(slots=True)
class Diagnosis:
    """The result of a diagnosis."""

    running: bool
    """Whether a node runs in the data directory."""
    findings: list[Finding] = field(default_factory=list)
    """Grave ones first, then by consequence."""
    peers: tuple[PeerId, ...] = ()
    """Peers that were dialled, or whose heartbeats were received."""
    complete_models: tuple[str, ...] = ()
    llamacpp: str | None = None
    """The installed build of llama.cpp; None where it is unusable."""

    @property
    def healthy(self) -> bool:
        """Whether no finding is grave."""
        return not any(finding.grave for finding in self.findings)

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings and sort all of them by gravity and consequence."""
        self.findings += findings
        order = list(Consequence)
        self.findings.sort(key=lambda finding: (not finding.grave, order.index(finding.consequence)))


@dataclass(frozen=True, slots=True)
class RunningNode:
    """Status and models of the running node that is examined."""

    status: NodeStatus
    models: Sequence[ModelDocument]
