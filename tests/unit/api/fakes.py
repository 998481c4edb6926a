"""A node without a swarm behind the real HTTP server, on a loopback port."""

import threading
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import trio

from node.api.access import Access
from node.api.application import make_app
from node.api.interface import (
    Explanation,
    JobDocument,
    JoinDocument,
    LearningDocument,
    ModelDocument,
    NodeStatus,
    PastDecisions,
    PeerStatus,
    Sample,
    SelectionStatus,
)
from node.api.job_document import describe_recent_job
from node.api.server import serve
from node.config import ApiKey, ServeSpec, hash_api_key
from node.coordinator.chat import ChatFormat
from node.coordinator.observation import ServedJob
from node.coordinator.recent_jobs import RecentJobs
from node.coordinator.submission import (
    Consensus,
    Cost,
    JobError,
    JobErrorCode,
    JobEvent,
    JobRequest,
    JobResult,
    JobStarted,
    ModelCapabilities,
    PromptScored,
    TextDelta,
    Timing,
    TokenLogprob,
    Usage,
    Vote,
)
from node.coordinator.trial import MethodTrial, Run, Trial, TrialSpec
from node.telemetry.observer import Telemetry
from protocol.identity import BlockRange, JobId, ModelId, peer_id_from_public_key
from protocol.measurements import MethodInForce, Objective, QualityBound, StageObservation
from protocol.messages import FinishReason, SessionStatistics
from selector.task import BASELINE, PORTFOLIO, Method, MethodError, method, parse_method, portfolio

JOB = JobId("0123456789abcdef" * 2)
MODEL = ModelId("ab" * 32)
PEERS = (peer_id_from_public_key(b"1" * 32), peer_id_from_public_key(b"2" * 32))


FASTER = method(engine="fused").name
DRAFTED = method(engine="fused", speculation="draft-8").name
SELECTION: SelectionStatus = {
    "basis": "model",
    "model_version": 3,
    "experiences": 120,
    "training_s": 2.5,
    "trained_ago_s": 60.0,
    "jobs": 40,
    "explored_jobs": 2,
    "regret_s": 0.75,
    "trials": 3,
    "trial_s": 12.0,
    "budget_left_s": 20.0,
}


def make_result(text: str, token_ids: tuple[int, ...]) -> JobResult:
    return JobResult(
        job_id=JOB,
        model=MODEL,
        model_name="tiny",
        text=text,
        token_ids=token_ids,
        finish_reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=5, completion_tokens=len(token_ids), cached_tokens=2, accepted_draft_tokens=1),
        timing=Timing(ttft_s=0.25, tpot_s=0.03, total_s=0.5),
        route=(
            StageObservation(
                peer=PEERS[0],
                blocks=BlockRange(0, 4),
                hardware="cpu",
                statistics=SessionStatistics(steps=3, rows=7, compute_s=0.1, queue_s=0.01),
            ),
            StageObservation(
                peer=PEERS[1],
                blocks=BlockRange(4, 8),
                hardware="cpu",
                statistics=SessionStatistics(steps=3, rows=7, compute_s=0.2, queue_s=0.02),
            ),
        ),
        method=MethodInForce(switches={"arithmetic": "fp32"}, stage_policy={"batching": "continuous"}),
        consensus=Consensus(
            votes=(Vote(peer=PEERS[0], scores={"arithmetic=fp32": -1.5}),),
            agreed="arithmetic=fp32",
            epoch=None,
            table_digest=None,
            weighed=False,
        ),
        replays=1,
        cost=Cost(objective=Objective.LATENCY, budget=None, predicted=0.4, actual=0.3),
    )


@dataclass
class FakeSubmitter:
    """Plays one job after another: says its words, then fails, waits for ever, or ends well."""

    words: tuple[str, ...] = ("Hello", ",", " wörld")
    refuse: JobError | None = None
    """Raised on entering the job."""
    ponders_s: float = 0.0
    """Seconds before the job is entered or refused."""
    refusals: int | None = None
    """How often at most; None for always."""
    room: int | None = None
    """How many jobs may be entered at a time before one is refused, if that is bounded."""
    fail: JobError | None = None
    """Raised after the words."""
    hang: bool = False
    """Never end after the words."""
    pauses: dict[int, float] = field(default_factory=dict)
    """Seconds before a word, by its number, and before the end."""
    chat_format: ChatFormat | None = None
    """How the model writes tool calls and reasoning."""
    chat_template: str = ""
    requests: list[JobRequest] = field(default_factory=list)
    entered: trio.Event = field(default_factory=trio.Event)
    left: trio.Event = field(default_factory=trio.Event)
    """A job's block was left."""
    running: int = 0
    """Jobs whose block is entered."""

    @asynccontextmanager
    async def submit(self, request: JobRequest) -> AsyncIterator[AsyncIterator[JobEvent]]:
        self.requests.append(request)
        self.entered.set()
        await trio.sleep(self.ponders_s)
        has_room = self.room is not None and self.running < self.room
        if self.refuse and not has_room and (self.refusals is None or len(self.requests) <= self.refusals):
            raise self.refuse
        try:
            self.running += 1
            async with aclosing(self._events(request)) as events:
                yield events
        finally:
            self.running -= 1
            self.left.set()

    async def count_tokens(self, request: JobRequest) -> int:
        self.requests.append(request)
        if self.refuse:
            raise self.refuse
        return sum(len(message.content.split()) for message in request.messages or ())

    async def capabilities_of(self, model: str) -> ModelCapabilities:
        if self.refuse:
            raise self.refuse
        return ModelCapabilities(max_positions=8192, chat_format=self.chat_format, chat_template=self.chat_template)

    async def _events(self, request: JobRequest) -> AsyncGenerator[JobEvent, None]:
        started = JobStarted(job_id=JOB, model=MODEL, model_name="tiny", prompt_tokens=5, created_s=1_700_000_000)
        started = replace(started, chat_format=self.chat_format)
        yield replace(started, echo=(request.prompt or "") if request.echo else "")
        if request.pooling is not None:
            length = float(len(request.prompt or request.prompt_tokens or ()))
            yield replace(make_result("", ()), embedding=array("f", (3.0, 4.0, 0.0, length)))
            return
        words = self.words if request.max_tokens != 0 else ()
        if request.prompt_logprobs:
            likeliest = tuple(TokenLogprob(number, b"x", -0.5) for number in range(request.top_logprobs or 0))
            prompt = [word.encode() for word in (request.prompt or "").split(" ")]
            scores = [TokenLogprob(number, b" " + word, -0.75, likeliest) for number, word in enumerate(prompt[1:], 1)]
            yield PromptScored((TokenLogprob(0, prompt[0], None),))
            yield PromptScored(tuple(scores))
        for index, word in enumerate(words):
            await trio.sleep(self.pauses.get(index, 0))
            logprobs: tuple[TokenLogprob, ...] = ()
            if request.top_logprobs is not None:
                likeliest = tuple(TokenLogprob(number, b"x", -0.5) for number in range(request.top_logprobs))
                logprobs = (TokenLogprob(index, word.encode(), -0.25, likeliest),)
            yield TextDelta(text=word, token_ids=(index,), logprobs=logprobs)
        await trio.sleep(self.pauses.get(len(words), 0))
        if self.hang:
            await trio.sleep_forever()
        if self.fail:
            raise self.fail
        yield make_result("".join(words), tuple(range(len(words))))


@dataclass
class FakeNode:
    """A node as the API sees it."""

    submitter: FakeSubmitter = field(default_factory=FakeSubmitter)
    draining: bool = False
    explained: list[tuple[JobRequest, dict[str, Any]]] = field(default_factory=list)
    benched: list[TrialSpec] = field(default_factory=list)
    bench_left: trio.Event = field(default_factory=trio.Event)
    """A measurement was left, done or not."""
    bench_hangs: bool = False
    confidence: float | None = 0.9
    """In the method in use; of the explanation."""
    not_ready: tuple[str, ...] = ()
    """Why it is not ready."""
    has_problems: tuple[str, ...] = ()
    """What it works in spite of."""
    telemetry: Telemetry = field(default_factory=lambda: Telemetry(lambda model: "tiny"))
    stopping: trio.Event = field(default_factory=trio.Event)
    recent_jobs: RecentJobs = field(default_factory=RecentJobs)
    agent: str = "metaswarm/0.1.0"
    is_silent: bool = False
    """Whether its status is not answered."""
    strangers: list[ModelDocument] = field(default_factory=list)
    """Further models."""

    def jobs(self, after: int = 0) -> tuple[list[JobDocument], int]:
        return [describe_recent_job(job) for job in self.recent_jobs.changed_since(after)], self.recent_jobs.revision

    def running_jobs(self) -> list[JobId]:
        return self.recent_jobs.running()

    def learning(self) -> LearningDocument:
        sample: Sample = {"at": 1_700_000_000.0, "observations": 7, "peers": 2, "jobs": 2, "regret_s": 0.5}
        past: PastDecisions = {"jobs": 0, "typical_error": None, "mean_regret_s": 0.0, "recent": []}
        return {"samples": [sample], "past": past, "late_predictions": 2}

    def join(self, serve: ServeSpec | None) -> JoinDocument:
        return {"here": f"metaswarm node --serve {serve or 'tiny'}", "elsewhere": None}

    async def bench(self, spec: TrialSpec) -> Trial:
        """Measure every job as half as long as the baseline's, to within a tenth."""
        measured = 1 + len(spec.methods or PORTFOLIO)
        spec.on_jobs_known(measured * (spec.rounds * spec.workload.concurrency + 1))
        self.benched.append(spec)
        try:
            if self.bench_hangs:
                await trio.sleep_forever()
        finally:
            self.bench_left.set()

        def run(seconds: float) -> Run:
            result = replace(make_result("x", (1,)), timing=Timing(ttft_s=seconds, tpot_s=0.0, total_s=seconds))
            served = SimpleNamespace(result=result)
            return Run(jobs=[cast("ServedJob", served)])

        try:
            methods = [parse_method(name) for name in spec.methods] or portfolio("safetensors")
        except MethodError as error:
            raise JobError(JobErrorCode.INVALID, str(error)) from None
        plain = [run(1.0) for _ in range(spec.rounds)]
        faster = [run(0.5 + 0.05 * (number % 2)) for number in range(spec.rounds)]

        def tried(each: Method) -> MethodTrial:
            if not each.exact and spec.quality is QualityBound.EXACT:
                return MethodTrial(method=each, error=f"{each.name} is not exact: use --quality near or any")
            if each.engine == "eager":
                return MethodTrial(method=each, error="not ready")
            return MethodTrial(method=each, runs=faster)

        return Trial(
            baseline=MethodTrial(method=BASELINE, runs=plain),
            methods=[tried(each) for each in methods if each != BASELINE],
            observations=spec.rounds,
        )

    async def status(self) -> NodeStatus:
        while self.is_silent:
            await trio.sleep(0.01)
        return self.status_document()

    def status_document(self) -> NodeStatus:
        return {
            "peer_id": PEERS[0],
            "agent": self.agent,
            "multiaddrs": [f"/ip4/127.0.0.1/tcp/4001/p2p/{PEERS[0]}"],
            "reachability": {
                "verdict": "private",
                "observed": ["/ip4/203.0.113.7/tcp/4001"],
                "endpoint_dependent": True,
                "port_mapped": False,
                "relays": [PEERS[0]],
                "relay_bytes_per_s": 0.0,
            },
            "api_url": "http://127.0.0.1:8642",
            "state": "draining" if self.draining else "serving",
            "uptime_s": 12.5,
            "connected_peers": 1,
            "clock_ahead_s": 0.4,
            "peers": {
                "known": 3,
                "reached": 1,
                "banned": 1,
                "sessions_opened": 9,
                "sessions_refused": 2,
                "sessions_failed": 1,
                "sessions_held": 1,
                "held_bytes": 2048,
            },
            "bootstrap": [],
            "serve": ["tiny:0-4"],
            "spans": [
                {
                    "model": MODEL,
                    "name": "tiny",
                    "start": 0,
                    "end": 4,
                    "block_count": 8,
                    "sessions": 1,
                    "queued_rows": 0,
                    "step_s": 0.004,
                    "reserved_positions": 64,
                    "cached_positions": 32,
                    "kv_positions": 4096,
                    "engine": None,
                    "device": "cpu",
                    "weight_bytes": 1 << 20,
                    "worker_pid": 4242,
                    "steps": 17,
                    "compute_s": 0.75,
                }
            ],
            "loading": [],
            "jobs": {
                "running": 1,
                "done": 2,
                "failed": 3,
                "cancelled": 4,
                "rejected": 5,
                "trials": {"running": 0, "done": 6, "failed": 7, "cancelled": 8, "rejected": 9},
            },
            "history": {"count": 7, "digest": "5a" * 32, "new_by_gossip": 4, "new_by_sync": 2, "last_equal_s": 3.0},
            "consensus": [
                {
                    "model": MODEL,
                    "name": "tiny",
                    "epoch": 2916666,
                    "statement": "5b" * 32,
                    "table_digest": "5c" * 32,
                    "members": 3,
                    "cells": 12,
                    "firm_cells": 10,
                    "weight": 2.303,
                    "measured": 4,
                    "current_epoch": 2916667,
                    "epoch_s": 600.0,
                    "phase": "measure",
                    "phase_ends_s": {"measure": 300.0, "reveal": 450.0, "propose": 600.0},
                    "statements": [
                        {
                            "epoch": 2916666,
                            "statement": "5b" * 32,
                            "proposer": PEERS[1],
                            "committee": 3,
                            "signatures": 3,
                            "members": 3,
                            "joined": 1,
                            "left": 0,
                            "expelled": 0,
                            "commits": 3,
                        }
                    ],
                }
            ],
            "selection": SELECTION,
            "transfers": {"received_bytes": {PEERS[1]: 4096}, "served_bytes": 1024},
            "problems": list(self.has_problems),
            "uncovered": [
                {
                    "model": "cd" * 32,
                    "name": "broken",
                    "start": 1,
                    "end": 3,
                    "memory_bytes": 3 << 20,
                    "serve": "broken:1-3",
                }
            ],
            "traffic": {"outbound_links": 2, "inbound_links": 1, "sent_bytes": 5000, "received_bytes": 6000},
        }

    async def problems(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return list(self.has_problems)

    def faults(self) -> list[str]:
        return ["the node is shutting down"] if self.draining else list(self.not_ready)

    async def explain(self, request: JobRequest, overrides: Mapping[str, Any]) -> Explanation:
        await trio.lowlevel.checkpoint()
        self.explained.append((request, dict(overrides)))
        if self.submitter.refuse:
            raise self.submitter.refuse
        return {
            "model": MODEL,
            "task": {"architecture": "llama", **overrides},
            "route": [{"peer": PEERS[0], "start": 0, "end": 8}],
            "selection": SELECTION,
            "methods": [
                {
                    "name": FASTER,
                    "predicted_s": 2.0,
                    "predicted_speedup": 1.8,
                    "speedup_low": 1.5,
                    "speedup_high": 2.25,
                    "votes": {PEERS[0]: 0.7},
                    "accepted": True,
                    "trial_speedup": None,
                }
            ],
            "not_offered": [DRAFTED],
            "agreed": FASTER,
            "reason": "lowest predicted cost",
            "confidence": self.confidence,
            "probes": [],
            "table_digest": None,
            "past": {"jobs": 0, "typical_error": None, "mean_regret_s": 0.0, "recent": []},
        }

    def peers(self) -> list[PeerStatus]:
        return [
            {
                "peer_id": PEERS[1],
                "addresses": ["/ip4/192.0.2.7/tcp/4001"],
                "agent": "metaswarm/0.1.0",
                "connected": True,
                "reached": True,
                "way": "direct",
                "relay": None,
                "leaving": False,
                "rtt_s": 0.0012,
                "neighbours": {},
                "hardware": "cpu-avx2",
                "last_seen_s": 0.4,
                "spans": [
                    {
                        "model": MODEL,
                        "name": "tiny",
                        "start": 4,
                        "end": 8,
                        "sessions": 2,
                        "queued_rows": 0,
                        "free_positions": 512,
                        "step_s": 0.003,
                    }
                ],
                "banned": {"left_s": 7.0, "reason": "a bad signature"},
                "sessions": {
                    "opened": 9,
                    "refused": {"full": 2},
                    "failed": {"engine": 1},
                    "faults": 4,
                    "held_sessions": 1,
                    "held_positions": 64,
                    "held_bytes": 2048,
                },
                "jobs": {
                    "served": 3,
                    "failed": 2,
                    "lagged": 1,
                    "trust": 0.5,
                    "avoided_s": 30.0,
                    "block_s": {MODEL: 0.001},
                },
            }
        ]

    def models(self) -> list[ModelDocument]:
        return [
            {
                "model": MODEL,
                "name": "tiny",
                "block_count": 8,
                "coverage": [1, 1, 1, 1, 2, 2, 2, 2],
                "uncovered": [],
                "apart": [],
                "complete": True,
                "local": True,
                "size_bytes": 90 << 20,
                "format": "gguf",
                "architecture": "llama",
                "weight_type": "q4_k",
                "max_positions": 8192,
                "quality": {
                    "fused/int8/fp32": {"greedy_agreement": 0.98, "mean_kl": 0.003, "perplexity_change": 0.001}
                },
            },
            {
                "model": "cd" * 32,
                "name": "broken",
                "block_count": 4,
                "coverage": [1, 0, 0, 1],
                "uncovered": [(1, 3)],
                "apart": [],
                "complete": False,
                "local": False,
                "size_bytes": None,
                "format": None,
                "architecture": None,
                "weight_type": None,
                "max_positions": None,
                "quality": {},
            },
            *self.strangers,
        ]


@asynccontextmanager
async def serve_node(node: FakeNode, api_key: str | None = None, access: Access | None = None) -> AsyncIterator[str]:
    """Serve the node inside the block; give the URL."""
    async with trio.open_nursery() as nursery:
        keys = () if api_key is None else (ApiKey(name="test", sha256=hash_api_key(api_key)),)
        app = make_app(node, access or Access(keys=keys))
        port: int = await nursery.start(partial(serve, app, "127.0.0.1", 0))
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


@contextmanager
def serve_in_thread(node: FakeNode, api_key: str | None = None) -> Iterator[str]:
    """Serve the node in a thread of its own, as another process would; give the URL."""
    started = threading.Event()
    url = ""
    token: trio.lowlevel.TrioToken
    scope = trio.CancelScope()

    async def run() -> None:
        nonlocal url, token
        token = trio.lowlevel.current_trio_token()
        with scope:
            async with serve_node(node, api_key) as url:
                started.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    assert started.wait(timeout=10)
    try:
        yield url
    finally:
        trio.from_thread.run_sync(scope.cancel, trio_token=token)
        thread.join()


async def send_request(
    url: str, path: str, body: bytes, length: int | None = None, *, version: str = "1.1", headers: str = ""
) -> trio.SocketStream:
    """Send a request on a connection of its own, for tests about how bytes flow; `length` None is the body's own."""
    stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/{version}\r\nHost: 127.0.0.1\r\n{headers}Content-Length: {length}\r\n\r\n"
    await stream.send_all(head.encode() + body)
    return stream


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
