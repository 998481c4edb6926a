"""The command line against real daemons and the real model."""

import fcntl
import itertools
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

from node.config import LOCK_FILE, READY_FILE
from node.models.store import Package
from tests.process.daemons import MODEL, Daemon
from tests.process.test_daemon import HALVES, QUESTION, metaswarm

StartSwarm = Callable[..., Awaitable[list[Daemon]]]


async def test_run_starts_a_node_answers_and_ends_it(tmp_path: Path, package: Package) -> None:
    environment = {"METASWARM_DATA_DIR": str(tmp_path)}
    arguments = ("run", MODEL, QUESTION, "--temperature", "0", "--max-tokens", "8")
    code, stdout, stderr = await metaswarm(*arguments, environment=environment)
    assert (code, stderr) == (0, "")
    assert "Paris" in stdout
    assert not (tmp_path / READY_FILE).exists()
    assert (tmp_path / "metaswarm.sqlite3").exists(), "what it learned is kept"
    with (tmp_path / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no node holds it any more


async def test_run_says_why_no_node_starts(tmp_path: Path, package: Package) -> None:
    environment = {"METASWARM_DATA_DIR": str(tmp_path), "METASWARM_MEMORY": "1PiB"}
    code, stdout, stderr = await metaswarm("run", MODEL, QUESTION, environment=environment)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "METASWARM_MEMORY: expected a size" in stderr
    (tmp_path / "file").write_text("")
    environment = {"METASWARM_DATA_DIR": os.fspath(tmp_path / "file")}
    code, stdout, stderr = await metaswarm("run", MODEL, QUESTION, environment=environment)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    assert "cannot use the data directory" in stderr


async def test_trace_adds_up_to_what_tokens_took(start_swarm: StartSwarm) -> None:
    first, second = await start_swarm(*HALVES)
    arguments = ("--model", MODEL, "--api", first.api_url, "--max-tokens", "24", "--ignore-eos")
    method = ("--method", "speculation=off")
    code, stdout, _ = await metaswarm("submit", QUESTION, "--chat", *arguments, *method, "--trace", "--json")
    assert code == 0
    answer = json.loads(stdout)
    trace = answer["trace"]
    assert [stage["peer"] for stage in trace["stages"]] == [first.peer_id, second.peer_id]
    assert [each["has_prompt"] for each in trace["rounds"]] == [True] + 23 * [False]
    parts = ("link_s", "queue_s", "compute_s", "serialise_s")
    for each in trace["rounds"][1:]:
        assert [timing["stage"] for timing in each["stages"]] == [0, 1]
        assert all(timing["compute_s"] > 0 and timing["serialise_s"] > 0 for timing in each["stages"])
    steps_s = [sum(timing[part] for timing in each["stages"] for part in parts) for each in trace["rounds"][1:]]
    arrivals_s = [each["arrived_s"] for each in trace["rounds"]]
    gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s)]
    assert 0.8 < median(steps_s) / median(gaps_s) < 1.25
    code, _, stderr = await metaswarm("submit", QUESTION, "--chat", *arguments, *method, "--trace")
    assert code == 0
    assert "median/p95 of 23" in stderr
