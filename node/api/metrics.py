"""`GET /metrics`: what the node has counted, and what it is now, in the text format of Prometheus."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from node.api.interface import ModelDocument, NodeStatus, NodeView
from node.telemetry.metrics import OTHER, NodeMetrics

F = TypeVar("F", CounterMetricFamily, GaugeMetricFamily)

PATH = "/metrics"


class MetricsPage:
    """The page of one node."""

    def __init__(self, node: NodeView, metrics: NodeMetrics) -> None:
        self._node = node
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """Return its route."""
        return [Route(PATH, self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """Return all metrics, in the format that the client accepts: Prometheus' text format, or OpenMetrics."""
        status = await self._node.status()
        families = [*_node_metrics(status, self._node.faults()), *_model_metrics(status, self._node.models())]
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body = encode(_Collected([*self._metrics.registry.collect(), *families]))
        return Response(body, headers={"content-type": content_type})


class _Collected(Collector):
    """Metrics that were just read."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._families


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"metaswarm_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"metaswarm_{name}", text, value=value)


def _labelled(kind: type[F], name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> F:
    family = kind(f"metaswarm_{name}", text, labels=[label])
    for value, number in values:
        family.add_metric([value], number)
    return family


_gauges = partial(_labelled, GaugeMetricFamily)
_counters = partial(_labelled, CounterMetricFamily)


def _node_metrics(status: NodeStatus, faults: Sequence[str]) -> list[Metric]:
    info = GaugeMetricFamily("metaswarm_node_info", "Who this is; always 1.", labels=["peer_id", "agent"])
    info.add_metric([status["peer_id"], status["agent"]], 1)
    jobs, history, samples = status["jobs"], status["history"], status["selection"]["experiences"]
    running = [("user", jobs["running"]), ("trial", jobs["trials"]["running"])]
    metrics = [
        info,
        _gauge("ready", "Whether every span is served and the swarm is joined: 1 or 0.", not faults),
        _gauges("jobs_running", "Jobs under way that were submitted at this node.", "kind", running),
        _gauge("selection_samples", "Measurements that the model in use was trained on; 0 without one.", samples),
        *_peer_metrics(status),
    ]
    if history is not None:
        metrics.append(_gauge("history_observations", "Observations in the history of this node.", history["count"]))
        arrived = [("gossip", history["new_by_gossip"]), ("sync", history["new_by_sync"])]
        metrics.append(_counters("history_received", "Observations that came from peers.", "by", arrived))
    return metrics


def _peer_metrics(status: NodeStatus) -> list[Metric]:
    peers, traffic, transfers = status["peers"], status["traffic"], status["transfers"]
    states = [("known", peers["known"]), ("reached", peers["reached"]), ("banned", peers["banned"])]
    opened, refused, failed = peers["sessions_opened"], peers["sessions_refused"], peers["sessions_failed"]
    requests = [("opened", opened), ("refused", refused)]
    links = [("out", traffic["outbound_links"]), ("in", traffic["inbound_links"])]
    carried = [("out", traffic["sent_bytes"]), ("in", traffic["received_bytes"])]
    files = [("out", transfers["served_bytes"]), ("in", sum(transfers["received_bytes"].values()))]
    return [
        _gauges("peers", "Peers, by what is known.", "state", [*states, ("connected", status["connected_peers"])]),
        _gauges("links", "Job streams between this node and its peers.", "direction", links),
        _counters("network_bytes", "Bytes carried by the connections with peers.", "direction", carried),
        _counters("model_file_bytes", "Bytes of model files exchanged with peers.", "direction", files),
        _counters("stage_requests", "Requests of other peers for a session here, by result.", "result", requests),
        _counter("stage_sessions_failed", "Of the sessions opened for them, those that failed.", failed),
    ]


def _model_metrics(status: NodeStatus, models: Sequence[ModelDocument]) -> list[Metric]:
    blocks, sessions, positions, reserved = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    cached, weights = Counter[str](), Counter[str]()
    for span in status["spans"]:
        name = span["name"]
        blocks[name] += span["end"] - span["start"]
        sessions[name] += span["sessions"]
        positions[name] += span["kv_positions"]
        reserved[name] += span["reserved_positions"]
        cached[name] += span["cached_positions"]
        weights[name] += span["weight_bytes"]
    chains = status["consensus"]
    return [
        _gauges("blocks_served", "Transformer blocks served here.", "model", blocks.items()),
        _gauges("sessions", "Sessions open on the stages here.", "model", sessions.items()),
        _gauges("kv_cache_positions", "KV memory of the spans here, in tokens.", "model", positions.items()),
        _gauges("kv_cache_reserved_positions", "Of it, reserved by sessions.", "model", reserved.items()),
        _gauges("kv_cache_cached_positions", "Of it, prompts in the prefix cache alone.", "model", cached.items()),
        _gauges("weight_bytes", "Memory for weights.", "model", weights.items()),
        _gauges("uncovered_blocks", "Blocks that no peer serves, of models in service or to be served here.", "model",
                  _uncovered(status, models).items()),
        _gauges("consensus_epoch", "Epoch of the last agreed statement.", "model",
                  [(each["name"], each["epoch"]) for each in chains if each["epoch"] is not None]),
        _gauges("consensus_members", "Members of the last agreed statement.", "model",
                  [(each["name"], each["members"]) for each in chains]),
    ]  # fmt: skip


def _uncovered(status: NodeStatus, models: Sequence[ModelDocument]) -> Counter[str]:
    """Return how many blocks of each model no peer serves; a model that merely lies in the cache lacks none."""
    gaps, missing = Counter[str](), Counter[str]()
    for gap in status["uncovered"]:
        gaps[gap["model"]] += gap["end"] - gap["start"]
    names = {spec.partition(":")[0] for spec in status["serve"]}
    for each in models:
        is_to_be_served = any(each["name"] == name or each["model"].startswith(name) for name in names)
        whole = sum(end - start for start, end in each["uncovered"]) if is_to_be_served else 0
        # Peers may announce any number of others: no label is theirs to choose.
        missing[each["name"] if each["local"] else OTHER] += gaps[each["model"]] or whole
    return missing
