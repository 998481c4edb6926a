"""Real daemons: jobs, cancellation, crashes, drain, and errors of users."""

import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import trio

from node.models.store import Package
from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, until

StartSwarm = Callable[..., Awaitable[list[Daemon]]]

HALVES = ("0-15", "15-30")
QUESTION = "Name the capital of France."


async def metaswarm(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run a verb to its end; return exit code, stdout and stderr."""
    with trio.fail_after(120):
        done = await trio.run_process(
            [sys.executable, "-m", "node", *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def held(daemon: Daemon) -> int:
    """Return the KV positions that a daemon's spans hold reserved."""
    return sum(span["reserved_positions"] for span in (await daemon.get("/swarm/status"))["spans"])


async def test_peer_without_model_files_submits(
    start_swarm: StartSwarm, start_daemon: StartDaemon, package: Package, tmp_path: Path
) -> None:
    first, second = await start_swarm(*HALVES)
    newcomer = await start_daemon(
        "--no-catalogue",
        "--bootstrap",
        second.multiaddr,
        environment={"METASWARM_CACHE_DIR": str(tmp_path / "empty cache")},
    )
    await until(lambda: is_complete(newcomer))
    code, stdout, _ = await metaswarm(
        "submit", QUESTION, "--chat", "--model", MODEL, "--api", newcomer.api_url, "--max-tokens", "16", "--json"
    )
    assert code == 0
    answer = json.loads(stdout)
    assert set(answer) == {
        *("job_id", "model", "text", "token_ids", "finish_reason", "usage", "timing"),
        *("route", "method", "selection", "consensus", "cost", "replays"),
    }
    assert "Paris" in answer["text"]
    assert answer["route"] == [
        {"peer": first.peer_id, "start": 0, "end": 15},
        {"peer": second.peer_id, "start": 15, "end": 30},
    ]
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
    assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens", "accepted_draft_tokens"}
    assert set(answer["timing"]) == {"ttft_s", "tpot_s", "total_s"}
    assert set(answer["method"]) == {"name", "switches", "stage_policy"}
    assert set(answer["consensus"]) == {"votes", "agreed", "epoch", "table_digest", "weighed"}
    assert answer["replays"] == 0

    received = (await newcomer.get("/swarm/status"))["transfers"]["received_bytes"]
    tokenizer_bytes = sum(file.size_bytes for file in package.manifest.tokenizer_files)
    assert sum(received.values()) == tokenizer_bytes + len(package.manifest.data)
    assert set(received) <= {first.peer_id, second.peer_id}
    assert not list((tmp_path / "empty cache").rglob("block-*"))


async def test_client_disconnect_cancels_job_on_every_stage(start_swarm: StartSwarm) -> None:
    daemons = await start_swarm(*HALVES)
    request = {"model": MODEL, "prompt": "Once", "max_tokens": 400, "stream": True, "metaswarm": {"ignore_eos": True}}
    body = json.dumps(request).encode()
    host, port = daemons[0].api_url.removeprefix("http://").split(":")
    async with await trio.open_tcp_stream(host, int(port)) as client:
        await client.send_all(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
        await client.send_all(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        answer = b""
        while b"data: " not in answer:
            more = await client.receive_some()
            assert more, answer
            answer += more
        assert await held(daemons[1])

    async def nothing_held() -> bool:
        return not any([await held(daemon) for daemon in daemons])

    await until(nothing_held, timeout_s=2)


async def test_restarts_killed_worker_and_replays_its_job(start_daemon: StartDaemon) -> None:
    daemon = await start_daemon("--serve", MODEL)
    job: dict[str, Any] = {"prompt": "Once", "max_tokens": 60, "metaswarm": {"ignore_eos": True}}
    undisturbed = await daemon.complete(**job)
    span = (await daemon.get("/swarm/status"))["spans"][0]
    pid = span["worker_pid"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_at_work, daemon, pid, span["steps"])
        answer = await daemon.complete(**job)
    if "error" in answer:  # on a slow machine the job gives up before the new worker is loaded
        assert answer["error"]["code"] == "blocks_not_served"
    else:
        assert answer["metaswarm"]["replays"] == 0, "the same peer serves in its own place"
        assert answer["choices"] == undisturbed["choices"]

    async def serves_again() -> bool:
        spans = (await daemon.get("/swarm/status"))["spans"]
        return bool(spans) and spans[0]["worker_pid"] not in {pid, None} and await is_complete(daemon)

    await until(serves_again, timeout_s=60)
    assert (await daemon.complete(**job))["choices"] == undisturbed["choices"]


async def kill_at_work(daemon: Daemon, pid: int, steps: int) -> None:
    """Kill a worker once it has done some steps more."""

    async def has_begun() -> bool:
        return bool((await daemon.get("/swarm/status"))["spans"][0]["steps"] > steps + 3)

    await until(has_begun)
    os.kill(pid, signal.SIGKILL)


async def test_survives_garbage_on_its_port(start_daemon: StartDaemon) -> None:
    daemon = await start_daemon()
    port = int(daemon.multiaddr.split("/")[4])
    for garbage in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x13/multistream/1.0.0\n" + os.urandom(3000),
        os.urandom(100_000),
    ):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            try:
                await stream.send_all(garbage)
                await stream.send_eof()
                with trio.move_on_after(5):
                    while await stream.receive_some(4096):
                        pass
            except trio.BrokenResourceError:
                pass  # cut off, as it should be
    assert (await daemon.get("/health"))["status"] == "ok"
    other = await start_daemon("--bootstrap", daemon.multiaddr)

    async def has_met() -> bool:
        return daemon.peer_id in {peer["peer_id"] for peer in (await other.get("/swarm/peers"))["peers"]}

    await until(has_met)


async def test_error_names_uncovered_blocks(start_daemon: StartDaemon) -> None:
    daemon = await start_daemon("--serve", f"{MODEL}:0-15")
    code, stdout, stderr = await metaswarm("submit", "hi", "--model", MODEL, "--api", daemon.api_url)
    assert (code, stdout) == (1, "")
    assert "blocks 15-30" in stderr
    assert len(stderr.strip().splitlines()) == 1
    async with httpx.AsyncClient(base_url=daemon.api_url) as client:
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0


async def test_forgets_dead_peer_and_drained_peer_at_once(start_daemon: StartDaemon) -> None:
    first = await start_daemon()
    dying = await start_daemon("--bootstrap", first.multiaddr)
    leaving = await start_daemon("--bootstrap", first.multiaddr)

    async def knows(*daemons: Daemon) -> bool:
        known = {p["peer_id"] for p in (await first.get("/swarm/peers"))["peers"] if p["last_seen_s"] is not None}
        return known == {daemon.peer_id for daemon in daemons}

    await until(lambda: knows(dying, leaving))
    leaving.process.terminate()
    await until(lambda: knows(dying), timeout_s=3)
    with trio.fail_after(5):
        assert await leaving.process.wait() == 0
    assert not (leaving.data_dir / "node.json").exists()
    await dying.kill()
    await until(lambda: knows(), timeout_s=13)


async def test_drain_finishes_job_and_second_signal_exits_at_once(start_daemon: StartDaemon) -> None:
    patient = await start_daemon("--serve", MODEL)
    answers: list[dict[str, Any]] = []

    async def submit() -> None:
        answers.append(await patient.complete(prompt="Once", max_tokens=30, metaswarm={"ignore_eos": True}))

    async def is_busy() -> bool:
        return bool(await held(patient))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(submit)
        await until(is_busy)
        patient.process.terminate()
    assert answers[0]["usage"]["completion_tokens"] == 30
    with trio.fail_after(10):
        assert await patient.process.wait() == 0


USAGE_ERRORS: tuple[tuple[list[str], int, str], ...] = (
    (["--serve", "no-such-model"], 1, "no model 'no-such-model'"),
    (["--serve", f"{MODEL}:20-40"], 1, "blocks 0-30"),
    (["--serve", f"{MODEL}:9-3"], 2, "9-3"),
    (["--listen", "/ip4/127.0.0.1/tcp/TAKEN"], 1, "port TAKEN on 127.0.0.1 is taken (--listen)"),
    (["--api", "127.0.0.1:TAKEN"], 1, "TAKEN"),
    (["--api", "0.0.0.0:0"], 2, "API key"),
    (["--bootstrap", "BROKEN.yaml"], 2, "line 2"),
    (["--config", "missing.toml"], 2, "missing.toml"),
    (["--memory", "lots"], 2, "lots"),
)


async def test_usage_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "BROKEN.yaml").write_text("peers:\n\t- tabs are not allowed\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])

        async def check(number: int, arguments: list[str], code: int, words: str) -> None:
            given = [a.replace("TAKEN", port).replace("BROKEN.yaml", str(tmp_path / "BROKEN.yaml")) for a in arguments]
            base = ["--data-dir", str(tmp_path / f"node-{number}"), "--api", "127.0.0.1:0"]
            async with room:
                exit_code, stdout, stderr = await metaswarm("node", *base, "--listen", "/ip4/127.0.0.1/tcp/0", *given)
            lines = [line for line in stderr.splitlines() if line.startswith(("metaswarm: ", "Error: "))]
            assert exit_code == code, (arguments, stderr)
            assert stdout == "", arguments
            assert len(lines) == 1, (arguments, stderr)
            assert words.replace("TAKEN", port) in lines[0], arguments
            assert "Traceback" not in stderr, arguments

        room = trio.CapacityLimiter(3)
        async with trio.open_nursery() as nursery:
            for number, error in enumerate(USAGE_ERRORS):
                nursery.start_soon(check, number, *error)


async def test_refetches_damaged_block_file_before_serving(
    start_daemon: StartDaemon, package: Package, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "models" / package.model_id
    cache.mkdir(parents=True)
    for file in package.path.iterdir():
        (cache / file.name).hardlink_to(file)
    damaged = cache / package.manifest.blocks[3].name
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.unlink()
    damaged.write_bytes(data)

    healthy = await start_daemon("--serve", f"{MODEL}:0-5")
    daemon = await start_daemon(
        *("--serve", f"{MODEL}:0-5", "--no-catalogue", "--bootstrap", healthy.multiaddr),
        environment={"METASWARM_CACHE_DIR": str(tmp_path / "cache")},
    )
    received = (await daemon.get("/swarm/status"))["transfers"]["received_bytes"]
    assert received == {healthy.peer_id: len(data)}
    assert damaged.read_bytes() == (package.path / damaged.name).read_bytes()
