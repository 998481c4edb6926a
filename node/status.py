"""The node as its API shows it: the answers of `/swarm/…`, put together from what the rooms know."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from node.api.explanation import explain, selection_status
from node.api.interface import (
    Ban,
    ChainStatus,
    Explanation,
    Gap,
    HistoryStatus,
    ModelStatus,
    NodeStatus,
    PeerCounts,
    PeerJobs,
    PeerSessions,
    PeerStatus,
    ServedSpan,
    SpanSummary,
)
from node.consensus.chain_node import ChainNode
from node.consensus.followed_chains import FollowedChains
from node.consensus.service import ConsensusService
from node.coordinator.coordinator import Coordinator
from node.coordinator.quality_store import LocalQualityStore
from node.coordinator.submission import JobRequest
from node.coordinator.trial_runner import BenchmarkRunner, Trial, TrialSpec
from node.models.library import Library
from node.network.interface import Network
from node.replication.observations import ObservationReplicator
from node.selection.chooser import LearnedChooser
from node.selection.learner import Learner
from node.stages.peer_records import StagePeerStatistics
from node.stages.span import Span
from node.stages.span_supervisor import WEIGHT_SHARE
from node.stages.stage_server import StageServer
from node.storage.database import StorageError
from node.storage.history import HistoryStore
from node.swarm.membership import Membership
from protocol.identity import BlockRange, ModelId, PeerId
from selector.consensus.reputation import WEIGHT_SCALE
from selector.reliability import PeerRecord
from selector.routing import uncovered


class StatusView:
    """Implements `NodeView`."""

    def __init__(
        self,
        *,
        agent: str,
        serve: Sequence[str],
        network: Network,
        membership: Membership,
        coordinator: Coordinator,
        trials: BenchmarkRunner,
        stages: StageServer,
        library: Library,
        ledger: LocalQualityStore,
        history: HistoryStore,
        dissemination: ObservationReplicator,
        consensus: ConsensusService,
        chains: FollowedChains,
        chooser: LearnedChooser,
        learner: Learner,
    ) -> None:
        self.api_url = ""
        self.submitter = coordinator
        self._trials = trials
        self._agent = agent
        self._serve = list(serve)
        self._network = network
        self._membership = membership
        self._stages = stages
        self._library = library
        self._ledger = ledger
        self._history = history
        self._dissemination = dissemination
        self._consensus = consensus
        self._chains = chains
        self._chooser = chooser
        self._learner = learner
        self._started_s = time.monotonic()

    async def bench(self, spec: TrialSpec) -> Trial:
        """Measure methods against the baseline; see `NodeView`."""
        return await self._trials.run(spec)

    async def status(self) -> NodeStatus:
        """Return what this node is and does."""
        jobs = self.submitter.statistics()
        transfers = self._library.transfers()
        return {
            "peer_id": self._network.peer_id,
            "agent": self._agent,
            "multiaddrs": list(self._network.multiaddrs),
            "api_url": self.api_url,
            "state": "draining" if self._stages.is_draining else "serving",
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "connected_peers": len(self._network.connected_peers()),
            "peers": self._peer_counts(),
            "bootstrap": [
                {"multiaddr": each.multiaddr, "peer_id": each.peer, "error": each.error}
                for each in self._membership.bootstrap()
            ],
            "serve": self._serve,
            "spans": [self._served_span(span) for span in self._stages.spans()],
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
                },
            },
            "history": await self._history_status(),
            "consensus": [self._chain_status(model, chain) for model, chain in self._chains.nodes.items()],
            "selection": selection_status(self._chooser, self._learner.status),
            "transfers": {
                "received_bytes": {str(peer): count for peer, count in transfers.received_bytes.items()},
                "served_bytes": transfers.served_bytes,
            },
            "uncovered": [gap for model in self._membership.served_models() for gap in self._gaps(model)],
        }

    def _gaps(self, model: ModelId) -> list[Gap]:
        """Return which blocks of a model nobody serves, and what would serve them."""
        manifest = self._library.local_manifest(model)
        status = self._model(model)
        return [
            Gap(
                model=model,
                name=status["name"],
                start=start,
                end=end,
                memory_bytes=int(manifest.bytes_of(BlockRange(start, end)) / WEIGHT_SHARE) if manifest else None,
                serve=f"{status['name']}:{start}-{end}",
            )
            for start, end in status["uncovered"]
        ]

    async def _history_status(self) -> HistoryStatus | None:
        try:
            held = await self._history.digest()
        except StorageError:
            return None
        statistics = self._dissemination.statistics()
        equal_s = statistics.last_equal_s
        return {
            "count": held.count,
            "digest": held.digest.hex(),
            "new_by_gossip": statistics.new_by_gossip,
            "new_by_sync": statistics.new_by_sync,
            "last_equal_s": None if equal_s is None else round(trio.current_time() - equal_s, 3),
        }

    def _chain_status(self, model: ModelId, chain: ChainNode) -> ChainStatus:
        agreement = chain.agreement
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
            "measured": chain.statistics.measured,
        }

    def _bans(self) -> dict[PeerId, Ban]:
        bans = self._dissemination.bans() | self._consensus.bans()
        return {peer: {"left_s": round(ban.left_s, 3), "reason": ban.reason} for peer, ban in bans.items()}

    def _peer_counts(self) -> PeerCounts:
        directory, asked = self._membership.directory, self._stages.peer_statistics().values()
        known = [each for each in directory.presences() if each.peer != self._network.peer_id]
        reached = [each for each in directory.reached() if each.peer != self._network.peer_id]
        return {
            "known": len(known),
            "reached": len(reached),
            "banned": len(self._bans()),
            "sessions_opened": sum(each.opened for each in asked),
            "sessions_refused": sum(sum(each.refused.values()) for each in asked),
            "sessions_failed": sum(sum(each.failed.values()) for each in asked),
            "sessions_held": sum(each.sessions for each in asked),
            "held_bytes": sum(each.bytes for each in asked),
        }

    def peers(self) -> list[PeerStatus]:
        """Return the known peers, without this one."""
        now_s = trio.current_time()
        connected = set(self._network.connected_peers())
        directory = self._membership.directory
        # Who left for good has closed its connections; until then it ends the work that it has.
        leaving = {p.peer: p for p in directory.departing() if p.peer in connected}
        heard = leaving | {p.peer: p for p in directory.presences() if p.peer != self._network.peer_id}
        reached = {each.peer for each in directory.reached()} | connected
        bans, sessions, jobs = self._bans(), self._stages.peer_statistics(), self.submitter.peer_records()
        peers: list[PeerStatus] = []
        for peer in sorted({*heard, *connected, *bans, *sessions, *jobs} - {self._network.peer_id}):
            presence = heard.get(peer)
            peers.append(
                {
                    "peer_id": peer,
                    "addresses": list(presence.multiaddrs if presence else self._network.addresses_of(peer)),
                    "agent": presence.agent if presence else "",
                    "connected": peer in connected,
                    "reached": peer in reached,
                    "leaving": peer in leaving,
                    "rtt_s": self._membership.round_trip_s(peer),
                    "last_seen_s": round(now_s - presence.last_heard_s, 3) if presence else None,
                    "spans": [
                        SpanSummary(
                            model=span.model,
                            name=self._library.name_of(span.model),
                            start=span.blocks.start,
                            end=span.blocks.end,
                        )
                        for span in (presence.spans if presence else ())
                    ],
                    "banned": bans.get(peer),
                    "sessions": _sessions(sessions[peer]) if peer in sessions else None,
                    "jobs": _jobs(jobs[peer]) if peer in jobs else None,
                }
            )
        return peers

    def models(self) -> list[ModelStatus]:
        """Return the models that somebody serves or that are at hand here."""
        served = self._membership.directory.models()
        return [self._model(model) for model in sorted({*served, *self._library.local_models()})]

    async def explain(self, request: JobRequest, told: Mapping[str, Any]) -> Explanation:
        """Ask the stages what a job would be served with; see NodeView."""
        considered = await self.submitter.consider(request, told)
        return explain(considered, self._chooser, self._learner.status)

    def _model(self, model: ModelId) -> ModelStatus:
        spans = [candidate.stage.blocks for candidate in self._membership.directory.candidates(model)]
        manifest = self._library.local_manifest(model)
        # Where the manifest is not at hand yet, the blocks that are served are all that is known.
        block_count = manifest.block_count if manifest else max((span.end for span in spans), default=0)
        coverage = [sum(block in span for span in spans) for block in range(block_count)]
        missing = uncovered(block_count, spans)
        return {
            "model": model,
            "name": self._library.name_of(model),
            "block_count": block_count,
            "coverage": coverage,
            "uncovered": [(gap.start, gap.end) for gap in missing],
            "complete": manifest is not None and not missing,
            "local": manifest is not None,
            "quality": {
                kv_key: None
                if each is None
                else {
                    "greedy_agreement": each.greedy_agreement,
                    "mean_kl": each.mean_kl,
                    "perplexity_change": each.perplexity_change,
                }
                for kv_key, each in self._ledger.figures(model).items()
            },
        }

    def _served_span(self, span: Span) -> ServedSpan:
        info = span.info
        statistics = span.engine.statistics()
        return {
            "model": info.model,
            "name": self._library.name_of(info.model),
            "start": info.blocks.start,
            "end": info.blocks.end,
            "block_count": info.block_count,
            "sessions": len(span.sessions),
            "reserved_positions": statistics.reserved_positions,
            "kv_positions": info.kv_positions,
            "weight_bytes": info.weight_bytes,
            "worker_pid": statistics.worker_pid,
            "steps": statistics.steps,
            "compute_s": statistics.compute_s,
        }


def _sessions(asked: StagePeerStatistics) -> PeerSessions:
    return {
        "opened": asked.opened,
        "refused": {str(getattr(reason, "value", reason)): count for reason, count in asked.refused.items()},
        "failed": {str(getattr(reason, "value", reason)): count for reason, count in asked.failed.items()},
        "faults": asked.faults,
        "held_sessions": asked.sessions,
        "held_positions": asked.positions,
        "held_bytes": asked.bytes,
    }


def _jobs(shown: PeerRecord) -> PeerJobs:
    return {
        "served": shown.served,
        "failed": shown.failed,
        "lagged": shown.lagged,
        "trust": round(shown.trust, 3),
        "avoided_s": round(shown.avoided_s, 3),
        "block_s": {str(model): seconds for model, seconds in shown.block_s.items()},
    }
