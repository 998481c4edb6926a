"""Two real daemons as operators see them: the dashboard's metrics, logs, traces, readiness."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import trio

from node.models.store import Package
from node.util.interpreter import child_environment, python
from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, until
from tests.support.collector import Collector
from tests.support.dashboards import metrics_in, queries_of

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/metaswarm.json"
CLIENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
PROMPT = "Alpha, beta, gamma, delta"


async def test_what_operators_see(start_daemon: StartDaemon, package: Package, tmp_path: Path) -> None:
    with Collector() as collector:
        settings: dict[str, Any] = {
            "environment": {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"},
            "file_limit_bytes": 1 << 40,  # its log goes to a file then
        }
        flags = ("--log-format", "json", "--exploration", "0")
        first = await start_daemon("--serve", f"{MODEL}:0-15", *flags, **settings)
        second = await start_daemon("--serve", f"{MODEL}:15-30", "--bootstrap", first.multiaddr, *flags, **settings)
        await until(lambda: is_complete(first))
        await check_ready(second)
        await check_job(first)
        await check_metrics(first)
        await check_logs(first, second)

        async def has_spans() -> bool:
            return {"job", "stage 0-15", "stage 15-30"} <= {span.name for span in collector.spans()}

        await until(has_spans)
        assert {span.trace_id.hex() for span in collector.spans() if span.name == "job"} == {"ab" * 16}
        assert {span.trace_id.hex() for span in collector.spans() if span.name.startswith("stage ")} >= {"ab" * 16}
    await check_conflicts(first)


async def check_ready(daemon: Daemon) -> None:
    assert await daemon.get("/health/ready") == {"status": "ok"}
    assert await daemon.get("/health/live") == {"status": "ok"}


async def check_job(daemon: Daemon) -> None:
    headers = {"X-Request-Id": "mine-1", "traceparent": CLIENT}
    async with httpx.AsyncClient(base_url=daemon.api_url, timeout=120) as client:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text


async def check_metrics(daemon: Daemon) -> None:
    """Every metric that the dashboard queries is there."""
    async with httpx.AsyncClient(base_url=daemon.api_url) as client:
        text = (await client.get("/metrics")).text
    declared = {(name, kind) for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)}
    names = {name for name, _ in declared}
    parts = {
        f"{name}{part}" for name, kind in declared if kind == "histogram" for part in ("_bucket", "_sum", "_count")
    }
    missing = metrics_in(queries_of(DASHBOARD)) - names - parts
    assert not missing
    for line in (
        f'metaswarm_generated_tokens_total{{model="{MODEL}"}} 8.0',
        f'metaswarm_blocks_served{{model="{MODEL}"}} 15.0',
        f'metaswarm_stage_queue_seconds_count{{model="{MODEL}",phase="decode"}} 7.0',
        'metaswarm_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0',
    ):
        assert line in text


async def check_logs(*daemons: Daemon) -> None:
    """Every line is JSON; the job has one line, its sessions one each, all with the request's id and without text."""
    lines: list[dict[str, Any]] = []
    for daemon in daemons:
        text = await trio.Path(daemon.data_dir / "log").read_text()
        assert "Alpha" not in text
        lines += [json.loads(line) for line in text.splitlines()]
    ended = [line for line in lines if line.get("request_id") == "mine-1"]
    assert sorted(line["event"] for line in ended) == ["job ended", "session ended", "session ended"]
    (job,) = [line for line in ended if line["event"] == "job ended"]
    assert (job["outcome"], job["completion_tokens"], job["endpoint"]) == ("done", 8, "/v1/completions")
    assert {line["blocks"] for line in ended if line["event"] == "session ended"} == {"0-15", "15-30"}
    events = [line["event"] for line in lines]
    assert events.index("node starting") < events.index("listening") < events.index("node ready")


async def check_conflicts(daemon: Daemon) -> None:
    """A second node with all the same is told everything at once."""
    port = daemon.api_url.rpartition(":")[2]
    listen = daemon.multiaddr.partition("/p2p/")[0]
    command = [*python("-m", "node", "node"), "--data-dir", str(daemon.data_dir), "--api", f"127.0.0.1:{port}"]
    command += ["--listen", listen, "--serve", "no-such-model"]
    result = await trio.run_process(
        command, capture_stderr=True, check=False, env=child_environment(), stdin=subprocess.DEVNULL
    )
    said = result.stderr.decode()
    assert result.returncode == 1
    assert len(said.splitlines()) == 1
    for fact in (f"port {port} ", "(--listen)", "another node uses", "no-such-model", "--data-dir"):
        assert fact in said
