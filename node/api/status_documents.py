"""Parts of the documents of `/swarm/…`, from what a node knows."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Literal, cast

from node.api.interface import PeerJobs, PeerSessions, ReachabilityDocument, StatementDocument
from node.network.interface import Way
from node.stages.peer_penalties import StagePeerStatistics
from protocol.announcements import Reachability
from protocol.consensus_values import Statement
from protocol.identity import BlockRange
from selector.consensus.chain import ChainEntry
from selector.reliability import PeerRecord


def describe_reachability(known: Reachability) -> ReachabilityDocument:
    """Return whether and how this node can be reached."""
    return {
        "verdict": known.verdict.value,
        "observed": list(known.observed),
        "endpoint_dependent": known.endpoint_dependent,
        "port_mapped": known.port_mapped,
        "relays": list(known.relays),
        "relay_bytes_per_s": known.relay_bytes_per_s,
    }


def kind_of_way(way: Way | None) -> Literal["direct", "punched", "relayed"] | None:
    """Return what kind of connection leads to a peer; None without one."""
    if way is None:
        return None
    if way.relay is not None:
        return "relayed"
    return "punched" if way.punched else "direct"


def describe_sessions(asked: StagePeerStatistics) -> PeerSessions:
    """Return what a peer asked of this node."""
    return {
        "opened": asked.opened,
        "refused": {str(getattr(reason, "value", reason)): count for reason, count in asked.refused.items()},
        "failed": {str(getattr(reason, "value", reason)): count for reason, count in asked.failed.items()},
        "faults": asked.faults,
        "held_sessions": asked.sessions,
        "held_positions": asked.positions,
        "held_bytes": asked.bytes,
    }


def describe_peer_jobs(shown: PeerRecord) -> PeerJobs:
    """Return how a peer served this node's jobs."""
    rounded = replace(shown, trust=round(shown.trust, 3), avoided_s=round(shown.avoided_s, 3))
    return cast("PeerJobs", asdict(rounded))


def describe_statement(entry: ChainEntry, statement: Statement) -> StatementDocument:
    """Return a statement of a chain."""
    return {
        "epoch": entry.epoch,
        "statement": entry.id.hex(),
        "proposer": statement.proposer,
        "committee": len(entry.committee),
        "signatures": len(entry.signers),
        "members": len(entry.members),
        "joined": len(statement.joined),
        "left": len(statement.left),
        "expelled": len(statement.expelled),
        "commits": len(statement.commits),
    }


def outside(blocks: BlockRange, spans: Iterable[BlockRange]) -> list[BlockRange]:
    """Return the ranges of some blocks that are in none of the spans."""
    left = [blocks]
    for span in spans:
        ends = [((each.start, min(each.end, span.start)), (max(each.start, span.end), each.end)) for each in left]
        left = [BlockRange(start, end) for pair in ends for start, end in pair if start < end]
    return left
