"""The pages of a node as tables: status, peers, models."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from node.cli.output import format_bytes, format_duration, new_table, plural, printable
from node.models.id_prefix import PEER_ID_DIGITS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from node.api.interface import (
        ChainStatus,
        GapDocument,
        HistoryStatus,
        JobCounts,
        ModelDocument,
        NodeStatus,
        PeerCounts,
        PeerStatus,
        ReachabilityDocument,
        SelectionStatus,
    )

WATCH_INTERVAL_S: Final = 2.0
"""How often `--watch` fetches a page."""


def render_status(status: "NodeStatus") -> "RenderableType":
    """Render a node's status."""
    from rich.console import Group
    from rich.text import Text

    from node.cli.daemon import SERVES_NOTHING

    jobs, received = status["jobs"], status["transfers"]["received_bytes"]
    facts = {
        "peer": status["peer_id"],
        "agent": status["agent"],
        "state": f"{status['state']} for {format_duration(status['uptime_s'])}",
        "api": status["api_url"],
        "addresses": "\n          ".join(status["multiaddrs"]),
        "reach": _describe_reachability(status["reachability"]),
        "connected": plural(status["connected_peers"], "peer"),
        "peers": _describe_peers(status["peers"]),
        "jobs": _describe_jobs(jobs),
        "history": _describe_history(status["history"]),
        "agreed": "\n          ".join(map(_describe_chain, status["consensus"])) or "nothing",
        "methods": _describe_selection(status["selection"]),
        "fetched": ", ".join(f"{format_bytes(count)} of model files from {peer}" for peer, count in received.items())
        or "no model files from peers",
        "served": f"{format_bytes(status['transfers']['served_bytes'])} of model files to peers",
    }
    if status["spans"] and status["loading"]:
        facts["serves"] = _describe_loading(status)
    facts_and_faults = [*facts.items(), *_faults(status)]
    summary = Text("\n".join(f"{name:<9} {printable(value)}" for name, value in facts_and_faults))
    if not status["spans"]:
        missing = _describe_loading(status) or "the log says what is missing"
        waiting = f"no blocks yet of {', '.join(status['serve'])}: {missing}"
        return Group(summary, Text(f"serves    {waiting if status['serve'] else SERVES_NOTHING}"))
    return Group(summary, Text(), _span_table(status))


def _span_table(status: "NodeStatus") -> "Table":
    headings = (
        "model",
        ">blocks",
        ">of",
        "device",
        ">sessions",
        ">positions",
        ">weights",
        ">steps",
        ">compute",
        ">worker",
    )
    table = new_table(*headings)
    for span in status["spans"]:
        table.add_row(
            *texts(
                span["name"],
                f"{span['start']}-{span['end']}",
                span["block_count"],
                span["device"],
                span["sessions"],
                f"{span['reserved_positions']}/{span['kv_positions']}",
                format_bytes(span["weight_bytes"]),
                span["steps"],
                format_duration(span["compute_s"]),
                span["worker_pid"] or "",
            )
        )
    return table


def _faults(status: "NodeStatus") -> list[tuple[str, str]]:
    from node.swarm.clock_check import TOLERANCE_S, describe_skew

    ahead_s = status["clock_ahead_s"]
    clock = [] if ahead_s is None or abs(ahead_s) <= TOLERANCE_S else [("clock", describe_skew(ahead_s))]
    clock += [("problem", problem) for problem in status["problems"]]
    return clock + [("missing", _describe_gap(gap, status)) for gap in status["uncovered"]]


def _describe_loading(status: "NodeStatus") -> str:
    spans = [f"{span['start']}-{span['end']} of {span['name'] or span['model'][:12]}" for span in status["loading"]]
    return f"loading blocks {', '.join(spans)}" if spans else ""


def _describe_jobs(jobs: "JobCounts") -> str:
    trials = jobs["trials"]
    counts = [(jobs["running"], "running"), (jobs["done"], "done"), (jobs["failed"], "failed")]
    counts += [(jobs["cancelled"], "cancelled"), (jobs["rejected"], "rejected as client errors")]
    text = ", ".join(f"{count} {kind}" for count, kind in counts)
    return (
        f"{text}; runs of trials: {trials['running']} running, {trials['done']} done, "
        f"{trials['cancelled']} interrupted, {trials['rejected']} rejected, {trials['failed']} failed"
    )


def _describe_peers(peers: "PeerCounts") -> str:
    text = f"{peers['reached']} of {peers['known']} known reached, {peers['banned']} banned"
    return (
        f"{text}; their sessions here: {peers['sessions_opened']} opened, {peers['sessions_refused']} refused, "
        f"{peers['sessions_failed']} failed, {peers['sessions_held']} held with {format_bytes(peers['held_bytes'])}"
    )


def _describe_gap(gap: "GapDocument", status: "NodeStatus") -> str:
    """Return which blocks no peer serves, and the command that would."""
    from node.joining import best_address

    address = best_address(tuple(status["multiaddrs"]))
    command = ["metaswarm", "node", *(("--bootstrap", address) if address else ()), "--serve", gap["serve"]]
    needs = "" if gap["memory_bytes"] is None else f" that can give it {gap['memory_bytes'] >> 20} MiB (--memory)"
    return f"{gap['serve']} is not served; to serve it on a node{needs}:\n          {shlex.join(command)}"


def _describe_history(history: "HistoryStatus | None") -> str:
    if history is None:
        return "the database cannot be read"
    equal_s = history["last_equal_s"]
    agrees = "not yet in sync" if equal_s is None else f"in sync with a neighbour {format_duration(equal_s)} ago"
    return f"{plural(history['count'], 'observation')}, digest {history['digest'][:12]}, {agrees}"


def _describe_chain(chain: "ChainStatus") -> str:
    if chain["epoch"] is None or chain["table_digest"] is None:
        return f"{chain['name']}: no statement yet"
    weight = "not a member" if chain["weight"] is None else f"weight {chain['weight']:.2f}"
    return (
        f"{chain['name']}: epoch {chain['epoch']}, table {chain['table_digest'][:12]} with {chain['firm_cells']} of "
        f"{chain['cells']} cells firm, {chain['members']} members, {weight}"
    )


def _describe_selection(selection: "SelectionStatus") -> str:
    basis = (
        f"by a model of {plural(selection['experiences'], 'observation')}" if selection["experiences"] else "by rule"
    )
    return (
        f"chosen {basis}; {plural(selection['trials'], 'trial')} finished, "
        f"trials took {format_duration(selection['trial_s'])} in all, "
        f"{selection['explored_jobs']} of {plural(selection['jobs'], 'job')} explored"
    )


def render_peers(answer: dict[str, list["PeerStatus"]]) -> "RenderableType":
    """Render the peers."""
    from rich.text import Text

    peers = answer["peers"]
    if not peers:
        return Text("no peers known")
    table = new_table("peer", "address", "agent", "state", ">round trip", ">last seen", "serves", "problems")
    for peer in peers:
        spans = (f"{span['name'] or span['model'][:12]}:{span['start']}-{span['end']}" for span in peer["spans"])
        table.add_row(
            *texts(
                peer["peer_id"],
                short_address(peer["addresses"]),
                peer["agent"],
                describe_state(peer),
                "" if peer["rtt_s"] is None else f"{peer['rtt_s'] * 1000:.1f} ms",
                "" if peer["last_seen_s"] is None else f"{format_duration(peer['last_seen_s'])} ago",
                ", ".join(spans),
                _describe_problems(peer),
            )
        )
    return table


def describe_state(peer: Mapping[str, Any]) -> str:
    """Return how a peer is known to this node."""
    if not peer["reached"]:
        return "not reached"
    if peer["connected"] and not peer["leaving"] and peer["way"] == "relayed":
        return f"relayed by {(peer['relay'] or '')[-8:]}"
    if peer["connected"] and not peer["leaving"] and peer["way"] == "punched":
        return "connected (punched)"
    return "leaving" if peer["leaving"] else "connected" if peer["connected"] else "known"


def _describe_problems(peer: "PeerStatus") -> str:
    """Return refusals, failures and bans: of its sessions here, and of our jobs there."""
    parts: list[str] = []
    if ban := peer["banned"]:
        parts.append(f"banned for {format_duration(ban['left_s'])}: {ban['reason']}")
    if sessions := peer["sessions"]:
        for what in ("refused", "failed"):
            parts += [f"{plural(count, 'session')} {what}: {reason}" for reason, count in sessions[what].items()]
        if sessions["faults"]:
            parts.append(plural(sessions["faults"], "fault"))
        if sessions["held_sessions"]:
            held = f"{plural(sessions['held_positions'], 'position')} and {format_bytes(sessions['held_bytes'])}"
            parts.append(f"holds {held} in {plural(sessions['held_sessions'], 'session')}")
    if jobs := peer["jobs"]:
        parts += [f"{plural(jobs[what], 'job')} {what}" for what in ("failed", "lagged") if jobs[what]]
        if jobs["avoided_s"]:
            parts.append(f"avoided for {format_duration(jobs['avoided_s'])}")
    return "; ".join(parts)


def render_models(answer: dict[str, list["ModelDocument"]]) -> "RenderableType":
    """Render the models."""
    from rich.text import Text

    models = answer["models"]
    if not models:
        return Text("no models known: serve one with `metaswarm node --serve MODEL`")
    table = new_table("model", "id", ">blocks", "peers for each block", "missing", "state")
    for model in models:
        table.add_row(
            *texts(
                model["name"],
                model["model"][:PEER_ID_DIGITS],
                model["block_count"],
                coverage_bar(model["coverage"]),
                ", ".join(f"{start}-{end}" for start, end in model["uncovered"]),
                _describe_completeness(model),
            )
        )
    return table


def coverage_bar(coverage: list[int]) -> str:
    """Return one character for each block: the number of peers, `.` for none, `+` from ten on."""
    return "".join("." if count == 0 else str(count) if count < 10 else "+" for count in coverage)


def _describe_completeness(model: "ModelDocument") -> str:
    if model["apart"] and not model["uncovered"]:
        pairs = ", ".join(f"{a[-8:]} and {b[-8:]}" for a, b in model["apart"][:3])
        return f"incomplete: its peers have not reached each other ({pairs})"
    return "complete" if model["complete"] else "incomplete"


def _describe_reachability(reach: "ReachabilityDocument") -> str:
    """Return how this node is reached, in one line."""
    relays = f"through {len(reach['relays'])} relays" if reach["relays"] else "through no relay"
    what = {
        "public": "anyone can dial this node",
        "private": f"behind a NAT or firewall, reached {relays}",
        "unknown": "not tested yet: no peer outside of this network has tried to dial this node",
    }[reach["verdict"]]
    parts = [what]
    if reach["observed"]:
        parts.append(f"seen at {', '.join(reach['observed'])}")
    if reach["endpoint_dependent"]:
        parts.append("symmetric NAT")
    if reach["port_mapped"]:
        parts.append("port mapped (UPnP)")
    if reach["relay_bytes_per_s"]:
        parts.append(f"relays for others up to {format_bytes(int(reach['relay_bytes_per_s']))}/s")
    return "; ".join(parts)


def short_address(addresses: list[str]) -> str:
    """Return the first address, as HOST:PORT if possible."""
    if not addresses:
        return ""
    parts = addresses[0].split("/")
    return f"{parts[2]}:{parts[4]}" if len(parts) > 4 else addresses[0]


def texts(*cells: object) -> list[Any]:
    """Return cells without what would control the terminal."""
    from rich.text import Text

    return [Text(printable(str(cell)), overflow="fold") for cell in cells]
