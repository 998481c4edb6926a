"""The documents of `/swarm/…`, from the parts of a node."""

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypedDict, cast

import trio

from node.api.explanation import explain, past_decisions, selection_status
from node.api.interface import (
    BanDocument,
    ChainStatus,
    Explanation,
    GapDocument,
    HistoryStatus,
    JobDocument,
    JoinDocument,
    LearningDocument,
    LineageQuality,
    ModelDocument,
    NodeStatus,
    PeerCounts,
    PeerSpan,
    PeerStatus,
    Sample,
    SpanDocument,
    SpanSummary,
)
from node.api.job_document import describe_recent_job
from node.api.status_documents import (
    describe_peer_jobs,
    describe_reachability,
    describe_sessions,
    describe_statement,
    kind_of_way,
    outside,
)
from node.assembly import AGENT, NodeParts
from node.config import ServeSpec
from node.consensus.chain_node import ChainNode
from node.coordinator.observation import weight_type
from node.coordinator.submission import JobRequest
from node.models.files import disk_fault
from node.stages.memory_admission import span_bytes_for
from node.stages.span import Span
from node.storage.database import StorageError
from node.telemetry.observer import Telemetry
from node.util.samples import Samples
from node.util.text import one_line
from protocol.announcements import Placement, ServedSpan
from protocol.capabilities import hardware_class
from protocol.identity import BlockRange, JobId, ModelId, PeerId, Stage
from selector.consensus.reputation import WEIGHT_SCALE
from selector.cuts import Cuts
from selector.routing import NoRouteError, check_complete

SAMPLE_INTERVAL_S: Final = 10.0
MAX_SAMPLES: Final = 360
MAX_OTHER_MODELS: Final = 64
"""Models that are listed without a manifest here: first those that have a name here, then those of most peers."""
MAX_GAPS: Final = 64
"""Ranges of blocks that no peer serves, those of models with a manifest here first."""
MODELS_INTERVAL_S: Final = 1.0
"""How long the documents of models are used: with many spans announced they take a while."""
CHARTED_DECISIONS: Final = 200


class _Announced(TypedDict):
    """The part of PeerStatus that comes from a peer's capabilities."""

    neighbours: dict[str, float]
    hardware: str | None


class StatusView:
    """Implements `NodeView`."""

    def __init__(
        self,
        parts: NodeParts,
        serve: Sequence[str],
        telemetry: Telemetry,
        join: Callable[[ServeSpec | None], JoinDocument],
        data_dir: Path,
    ) -> None:
        self.api_url = ""
        self.stopping = trio.Event()
        self.telemetry = telemetry
        self.join = join
        self.submitter = parts.client.coordinator
        self.bench = parts.client.trials.run
        self._parts = parts
        self._serve = list(serve)
        self._data_dir = data_dir
        self._network = parts.network.network
        self._membership = parts.swarm.membership
        self._stages = parts.serving.stages
        self._library = parts.serving.library
        self._started_s = time.monotonic()
        self._samples: Samples[Sample] = Samples(MAX_SAMPLES)
        self._models: list[ModelDocument] = []
        self._models_read_s = -math.inf
        self._secret = secrets.token_bytes(16)
        """Makes an order of models that no peer can foresee, the same until the node ends."""

    async def status(self) -> NodeStatus:
        """Return the status of this node."""
        jobs = self.submitter.statistics
        transfers, selection = self._library.transfers(), self._parts.selection
        outbound, inbound = self._stages.link_pool.counts()
        return {
            "peer_id": self._network.peer_id,
            "agent": AGENT,
            "multiaddrs": list(self._network.multiaddrs),
            "reachability": describe_reachability(self._network.reachability),
            "api_url": self.api_url,
            "state": "draining" if self._stages.is_draining else "serving",
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "connected_peers": len(self._network.connected_peers()),
            "clock_ahead_s": self._membership.heartbeats.clock.ahead_s(),
            "peers": self._peer_counts(),
            "bootstrap": [
                {"multiaddr": each.multiaddr, "peer_id": each.peer, "error": each.error}
                for each in self._membership.bootstrap()
            ],
            "serve": self._serve,
            "spans": [self._served_span(span) for span in self._stages.spans()],
            "loading": [self._span_summary(each.model, each.blocks) for each in self._loading()],
            "jobs": {
                "running": jobs.running - jobs.trials_running,
                "done": jobs.done,
                "failed": jobs.failed,
                "cancelled": jobs.cancelled,
                "rejected": jobs.rejected,
                "trials": {
                    "running": jobs.trials_running,
                    "done": jobs.trials_done,
                    "failed": jobs.trials_failed,
                    "cancelled": jobs.trials_cancelled,
                    "rejected": jobs.trials_rejected,
                },
            },
            "history": await self._history_status(),
            "consensus": [
                self._chain_status(model, chain) for model, chain in self._parts.selection.chains.nodes.items()
            ],
            "selection": selection_status(selection.chooser, selection.learner.status),
            "transfers": {
                "received_bytes": {str(peer): count for peer, count in transfers.received_bytes.items()},
                "served_bytes": transfers.served_bytes,
            },
            "problems": await self.problems(),
            "uncovered": self._gaps(),
            "traffic": {
                "outbound_links": outbound,
                "inbound_links": inbound,
                "sent_bytes": self._network.byte_counts.sent,
                "received_bytes": self._network.byte_counts.received,
            },
        }

    async def problems(self) -> list[str]:
        """Return what the node works in spite of."""
        try:
            fault = await trio.to_thread.run_sync(disk_fault, self._data_dir)
        except OSError as error:
            fault = f"the disk of {self._data_dir} cannot be read: {one_line(error)}"
        return [each for each in (fault, self._membership.heartbeats.twin()) if each is not None]

    def faults(self) -> list[str]:
        """Return why the node is not ready."""
        unserved = self._parts.serving.supervisor.unserved
        faults = [f"{name} is not served: {reason}" for name, reason in sorted(unserved.items())]
        bootstrap = self._membership.bootstrap()
        if bootstrap and not self._network.connected_peers():
            faults.append(f"the swarm is not joined: none of {len(bootstrap)} bootstrap peers was reached")
        if self._stages.is_draining:
            faults.append("the node is shutting down")
        return faults

    def _loading(self) -> list[Placement]:
        """Return what this node has announced and does not serve yet."""
        served = [(span.info.model, span.info.blocks) for span in self._stages.spans()]

        def is_served(placed: Placement) -> bool:
            parts = (blocks for model, blocks in served if model == placed.model)  # one on each device
            return not outside(placed.blocks, parts)

        return [each for each in self._parts.swarm.placements.current().placements if not is_served(each)]

    def _gaps(self) -> list[GapDocument]:
        """Return the blocks that no peer serves of models of which peers serve others, and how to serve them.

        Without what this node is loading.
        """
        loading = self._loading()
        served = self._membership.directory.models()
        gaps: list[GapDocument] = []
        for each in sorted(self.models(), key=lambda model: not model["local"]):
            if (model := ModelId(each["model"])) in served:
                manifest = self._library.local_manifest(model)
                own = [placed.blocks for placed in loading if placed.model == model]
                missing = [left for gap in each["uncovered"] for left in outside(BlockRange(*gap), own)]
                for gap in missing[: MAX_GAPS - len(gaps)]:
                    blocks = gap if manifest is None else manifest.cuts.around(gap)
                    memory_bytes = span_bytes_for(manifest, blocks) if manifest else None
                    serve = f"{each['name']}:{blocks}"
                    gaps.append({**self._span_summary(model, blocks), "memory_bytes": memory_bytes, "serve": serve})
        return gaps

    def _span_summary(self, model: ModelId, blocks: BlockRange) -> SpanSummary:
        return {"model": model, "name": self._library.name_of(model), "start": blocks.start, "end": blocks.end}

    async def _history_status(self) -> HistoryStatus | None:
        try:
            held = await self._parts.network.history.digest()
        except StorageError:
            return None
        statistics = self._parts.swarm.replicator.statistics()
        equal_s = statistics.last_equal_s
        return {
            "count": held.count,
            "digest": held.digest.hex(),
            "new_by_gossip": statistics.new_by_gossip,
            "new_by_sync": statistics.new_by_sync,
            "last_equal_s": None if equal_s is None else round(trio.current_time() - equal_s, 3),
        }

    def _chain_status(self, model: ModelId, chain: ChainNode) -> ChainStatus:
        agreement, now_s = chain.agreement, chain.now_s()
        weight = agreement.weights.get(self._network.peer_id) if agreement else None
        return {
            "model": model,
            "name": self._library.name_of(model),
            "epoch": agreement.epoch if agreement else None,
            "statement": agreement.statement.hex() if agreement else None,
            "table_digest": agreement.table_digest.hex() if agreement else None,
            "members": len(agreement.weights) if agreement else 0,
            "cells": len(agreement.table) if agreement else 0,
            "firm_cells": sum(entry.firm for entry in agreement.table.values()) if agreement else 0,
            "weight": None if weight is None else round(weight / WEIGHT_SCALE, 3),
            "measured": chain.measured,
            "current_epoch": chain.clock.epoch_at(now_s),
            "epoch_s": chain.clock.epoch_s,
            "phase": chain.clock.phase_at(now_s),
            "phase_ends_s": chain.clock.phase_ends_s(),
            "statements": [describe_statement(entry, entry.statement) for entry in chain.recent if entry.statement],
        }

    def _bans(self) -> dict[PeerId, BanDocument]:
        bans = self._parts.swarm.replicator.bans() | self._parts.consensus.bans()
        return {peer: {"left_s": round(ban.left_s, 3), "reason": ban.reason} for peer, ban in bans.items()}

    def _peer_counts(self) -> PeerCounts:
        directory, totals, own = self._membership.directory, self._stages.session_totals(), self._network.peer_id
        holding = [each for peer, each in self._stages.peer_statistics().items() if peer != own]
        known = [each for each in directory.entries() if each.peer != own]
        reached = [each for each in directory.reached() if each.peer != own]
        return {
            "known": len(known),
            "reached": len(reached),
            "banned": len(self._bans()),
            "sessions_opened": totals.opened,
            "sessions_refused": totals.refused,
            "sessions_failed": totals.failed,
            "sessions_held": sum(each.sessions for each in holding),
            "held_bytes": sum(each.bytes for each in holding),
        }

    def peers(self) -> list[PeerStatus]:
        """Return the known peers, without this one."""
        now_s = trio.current_time()
        connected = set(self._network.connected_peers())
        directory = self._membership.directory
        # Draining peers end their work; once gone, they have closed their connections.
        leaving = {p.peer: p for p in directory.draining() if p.peer in connected}
        entries = leaving | {p.peer: p for p in directory.entries() if p.peer != self._network.peer_id}
        reached = {each.peer for each in directory.reached()} | connected
        bans, sessions, jobs = self._bans(), self._stages.peer_statistics(), self.submitter.peer_records()
        peers: list[PeerStatus] = []
        for peer in sorted({*entries, *connected, *bans, *sessions, *jobs} - {self._network.peer_id}):
            entry, way = entries.get(peer), self._network.way_to(peer)
            peers.append(
                {
                    "peer_id": peer,
                    "addresses": list(entry.multiaddrs if entry else self._network.addresses_of(peer)),
                    "agent": entry.agent if entry else "",
                    "connected": peer in connected,
                    "reached": peer in reached,
                    "way": kind_of_way(way),
                    "relay": None if way is None else way.relay,
                    "leaving": peer in leaving,
                    "rtt_s": self._membership.round_trip_s(peer),
                    **self._announced(peer),
                    "last_seen_s": round(now_s - entry.last_heard_s, 3) if entry else None,
                    "spans": [self._peer_span(span) for span in (entry.spans if entry else ())],
                    "banned": bans.get(peer),
                    "sessions": describe_sessions(sessions[peer]) if peer in sessions else None,
                    "jobs": describe_peer_jobs(jobs[peer]) if peer in jobs else None,
                }
            )
        return peers

    def _peer_span(self, span: ServedSpan) -> PeerSpan:
        load = span.load
        return {
            **self._span_summary(span.model, span.blocks),
            "sessions": load.sessions,
            "queued_rows": load.queued_rows,
            "free_positions": load.free_positions,
            "step_s": load.step_s,
        }

    def _announced(self, peer: PeerId) -> _Announced:
        """Return what a peer announces of its links and its hardware."""
        known = self._parts.swarm.announcer.known(peer)
        links = known.links if known else None
        return {
            "neighbours": {
                each.peer: each.round_trip_s for each in (links.neighbours if links else ()) if each.round_trip_s
            },
            "hardware": hardware_class(known) if known else None,
        }

    def jobs(self, after: int = 0) -> tuple[list[JobDocument], int]:
        """Return the recent jobs that changed after a revision, and the revision now."""
        recent = self.submitter.recent_jobs
        return [describe_recent_job(job) for job in recent.changed_since(after)], recent.revision

    def running_jobs(self) -> list[JobId]:
        """Return the jobs that have not ended."""
        return self.submitter.recent_jobs.running()

    def learning(self) -> LearningDocument:
        """Return how the history grew, and how past choices turned out."""
        chooser = self._parts.selection.chooser
        return {
            "samples": self._samples.all(),
            "past": past_decisions(chooser.decisions, CHARTED_DECISIONS),
            "late_predictions": chooser.predictions.late,
        }

    async def sample_loop(self) -> None:
        """Sample the node's figures until cancelled."""
        while True:
            history, decisions = await self._history_status(), self._parts.selection.chooser.decisions
            if history is not None:
                sample: Sample = {
                    "at": round(time.time(), 1),
                    "observations": history["count"],
                    "peers": len(self._membership.directory.reached()),
                    "jobs": self.submitter.statistics.done,
                    "regret_s": round(sum(selection.regret_s for _, selection in decisions), 3),
                }
                self._samples.add(sample)
            await trio.sleep(SAMPLE_INTERVAL_S)

    def models(self) -> list[ModelDocument]:
        """Return the models that peers serve or that are in the local cache."""
        now_s = trio.current_time()
        if now_s >= self._models_read_s + MODELS_INTERVAL_S:
            local, served = set(self._library.local_models()), self._membership.directory.models()
            named = self._library.named_models()

            def rank(model: ModelId) -> tuple[bool, int, bytes]:
                # Anybody may announce models that nobody else knows, by ids of his choice.
                tie = hashlib.blake2b(model.encode(), key=self._secret, digest_size=8).digest()
                return model not in named, -len(served[model]), tie

            others = sorted(served.keys() - local, key=rank)
            self._models = [self._model(model) for model in sorted({*local, *others[:MAX_OTHER_MODELS]})]
            self._models_read_s = now_s
        return self._models

    async def explain(self, request: JobRequest, overrides: Mapping[str, Any]) -> Explanation:
        """Collect the votes on a job; see NodeView."""
        considered = await self.submitter.consider(request, overrides)
        return explain(considered, self._parts.selection.chooser, self._parts.selection.learner.status)

    def _model(self, model: ModelId) -> ModelDocument:
        stages = [candidate.stage for candidate in self._membership.directory.candidates(model)]
        spans = [stage.blocks for stage in stages]
        manifest = self._library.local_manifest(model)
        # Without the manifest only the served blocks are known.
        cuts = manifest.cuts if manifest else Cuts(max((span.end for span in spans), default=0))
        missing, apart = self._gaps_between(model, cuts, stages, is_known=manifest is not None)
        return {
            "model": model,
            "name": self._library.name_of(model),
            "block_count": cuts.block_count,
            "coverage": cuts.coverage(spans),
            "uncovered": [(gap.start, gap.end) for gap in missing],
            "apart": list(apart),
            "complete": manifest is not None and not missing and not apart,
            "local": manifest is not None,
            "size_bytes": manifest.size_bytes if manifest else None,
            "format": manifest.format if manifest else None,
            "architecture": manifest.model_type if manifest else None,
            "weight_type": weight_type(manifest) if manifest else None,
            "max_positions": manifest.max_positions if manifest else None,
            "quality": {
                kv_key: None if figures is None else cast("LineageQuality", asdict(figures))
                for kv_key, figures in self._parts.client.quality_store.figures(model).items()
            },
        }

    def _gaps_between(
        self, model: ModelId, cuts: Cuts, stages: Sequence[Stage], *, is_known: bool
    ) -> tuple[Sequence[BlockRange], Sequence[tuple[str, str]]]:
        """Return the blocks that no peer announces; where there are none, the peers that keep a route from being.

        No route is looked for of a model that is not known here: of those anybody may announce any number.
        """
        if missing := cuts.uncovered(stage.blocks for stage in stages):
            unreached = self._membership.unreached_stages(model, missing)
            if left := cuts.uncovered([stage.blocks for stage in (*stages, *unreached)]):
                return left, ()
            own = self._network.peer_id
            return (), [(own, peer) for peer in dict.fromkeys(stage.peer for stage in unreached)]
        if is_known:
            try:
                check_complete(cuts, stages, self._parts.client.links.between)
            except NoRouteError as error:
                return (), error.apart
        return (), ()

    def _served_span(self, span: Span) -> SpanDocument:
        info, statistics, load = span.info, span.engine.statistics(), span.load()
        return {
            **self._span_summary(info.model, info.blocks),
            "block_count": info.block_count,
            "sessions": load.sessions,
            "queued_rows": load.queued_rows,
            "step_s": load.step_s,
            "device": info.device,
            "reserved_positions": statistics.reserved_positions,
            "cached_positions": statistics.cached_positions,
            "kv_positions": info.kv_positions,
            "weight_bytes": info.weight_bytes,
            "engine": info.engine,
            "worker_pid": statistics.worker_pid,
            "steps": statistics.steps,
            "compute_s": statistics.compute_s,
        }
