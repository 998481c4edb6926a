"""Stages that are killed in the middle of a job: the text is that of llama.cpp alone, or the job ends soon."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import trio

from node.models.gguf_file import read_gguf
from node.models.store import Package
from tests.process.daemons import MODEL, is_complete, running_daemon, until
from tests.process.failover import spared_swarm
from tests.support.demo_model import demo_gguf
from tests.support.tokenizers import load_tokenizer
from tests.unit.engine.llamacpp.packages import GgufFiles

PROMPT = "Once upon a time there was"
TOKENS = 120
"""So many that none of the jobs ends before its stage is killed, on a busy machine either."""
KILLED_BEFORE = 50


@pytest.fixture(scope="module")
def alone(package: Package) -> list[int]:
    """What llama.cpp generates greedily after the prompt, alone on the whole file."""
    whole = GgufFiles(read_gguf(demo_gguf()), package.path).alone()
    return whole.decode(load_tokenizer(package).encode(PROMPT), TOKENS)


async def test_replays_any_killed_stage_without_changing_text(alone: list[int], tmp_path: Path) -> None:
    async with spared_swarm(tmp_path) as swarm:
        undisturbed = await swarm.run(PROMPT, TOKENS)
        assert undisturbed.tokens == alone
        for stage, words, how in ((0, 1, signal.SIGKILL), (1, 20, signal.SIGSTOP), (2, 30, signal.SIGKILL)):
            outcome = await swarm.run(PROMPT, TOKENS, lose=(stage, words, how))
            assert outcome.tokens == alone
            assert outcome.text == undisturbed.text
            assert outcome.replays == 1, (stage, words)


async def test_stream_ends_with_error_when_only_server_dies(package: Package, tmp_path: Path) -> None:
    async with running_daemon(tmp_path / "coordinator", "--no-catalogue") as coordinator:
        join = ("--bootstrap", coordinator.multiaddr, "--serve", MODEL, "--threads", "1", "--no-catalogue")
        async with running_daemon(tmp_path / "holder", *join) as holder:
            await until(lambda: is_complete(coordinator))
            body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2000, "temperature": 0, "stream": True}
            came_s, text, killed_s = [trio.current_time()], b"", 0.0
            async with (
                httpx.AsyncClient(base_url=coordinator.api_url, timeout=60) as client,
                client.stream("POST", "/v1/completions", json=body | {"metaswarm": {"ignore_eos": True}}) as answer,
            ):
                async for data in answer.aiter_bytes():
                    text += data
                    came_s.append(trio.current_time())
                    if not killed_s and text.count(b"data: ") >= 5:
                        killed_s = trio.current_time()
                        os.killpg(holder.process.pid, signal.SIGKILL)
            assert trio.current_time() - killed_s < 10
            assert max(b - a for a, b in pairwise(came_s)) < 10
            *_, last, end = text.decode().split("\n\n")
            assert end == ""
            error = json.loads(last.removeprefix("data: "))["error"]
            assert (error["type"], error["code"]) == ("server_error", "blocks_not_served")
            async with httpx.AsyncClient(base_url=coordinator.api_url, timeout=60) as client:
                refused = await client.post("/v1/completions", json=body | {"stream": False})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_replays_stage_killed_at_any_word_without_changing_text(alone: list[int], tmp_path: Path) -> None:
    async with spared_swarm(tmp_path) as swarm:
        for words in range(1, KILLED_BEFORE):
            for stage in range(3):
                outcome = await swarm.run(PROMPT, TOKENS, lose=(stage, words, signal.SIGKILL))
                assert outcome.tokens == alone, (words, stage)
            await swarm.replenish()
