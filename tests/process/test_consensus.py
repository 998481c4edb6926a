"""Three daemons agree on what they measured; a fourth joins later, verifies the chain and uses the same table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from node.models.importer import import_model
from node.models.store import ModelStore
from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, until
from tests.support.random_llama import LlamaShape, write_llama

EPOCH_S = 6
FLAGS = ("--epoch", str(EPOCH_S))

TINY = LlamaShape(blocks=6, hidden=256, inner=512, heads=8, kv_heads=2, vocabulary=640)
MEASURING_EPOCH_S = 60
"""Long enough for three daemons to measure a cell of a tiny model one after another, on a busy machine."""

TRAINING_LIMIT_S = 300
"""Models are trained at the lowest priority."""


async def chain(daemon: Daemon) -> dict[str, Any]:
    """Return the status of the only model's chain on a daemon."""
    found: list[dict[str, Any]] = (await daemon.get("/swarm/status"))["consensus"]
    return found[0] if found else {"epoch": None, "statement": None, "members": 0}


async def record_agreements(daemon: Daemon, found: dict[int, str]) -> None:
    """Record the digest of the agreed table of every epoch on a daemon."""
    while True:
        status = await chain(daemon)
        if status["epoch"] is not None:
            found[status["epoch"]] = status["table_digest"]
        await trio.sleep(1)


async def test_newcomer_adopts_the_agreed_table_and_jobs_name_it(start_daemon: StartDaemon) -> None:
    first = await start_daemon("--serve", f"{MODEL}:0-10", *FLAGS)
    others: list[Daemon] = []

    async def start_another(blocks: str) -> None:
        flags = ("--serve", f"{MODEL}:{blocks}", "--bootstrap", first.multiaddr, *FLAGS)
        others.append(await start_daemon(*flags))

    async with trio.open_nursery() as nursery:
        for blocks in ("10-20", "20-30"):
            nursery.start_soon(start_another, blocks)

    async def have_agreed() -> bool:
        chains = [await chain(daemon) for daemon in (first, *others)]
        return len({each["statement"] for each in chains}) == 1 and chains[0]["members"] == 3

    await until(have_agreed, timeout_s=90)
    newcomer = await start_daemon("--bootstrap", others[1].multiaddr, *FLAGS)

    async def has_adopted() -> bool:
        adopted, agreed = await chain(newcomer), await chain(first)
        return adopted["statement"] is not None and adopted["statement"] == agreed["statement"]

    async def is_ready() -> bool:
        return await is_complete(newcomer)

    agreements: dict[int, str] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(record_agreements, first, agreements)
        await until(has_adopted, timeout_s=20)
        await until(is_ready)

        async def votes_follow() -> bool:
            """Whether stages name no table but agreed ones as what they learned from.

            Maybe none: an epoch is too short here to measure a cell in it. See the next test.
            """
            answer = await newcomer.complete(prompt="Once", max_tokens=2, metaswarm={"ignore_eos": True})
            digests = {vote["table_digest"] for vote in answer["metaswarm"]["consensus"]["votes"]}
            return digests <= {*agreements.values(), None}

        await until(votes_follow, timeout_s=60)
        nursery.cancel_scope.cancel()
    adopted = await chain(newcomer)
    assert adopted["weight"] is None
    assert adopted["members"] == 3


async def explain(daemon: Daemon) -> dict[str, Any]:
    """Return how a job of the tiny model would be served."""
    task = {"model": "tiny", "prompt_tokens": 64, "max_tokens": 32}
    async with httpx.AsyncClient(base_url=daemon.api_url, timeout=60) as http:
        answer = await http.post("/swarm/explain", json=task)
    return dict(answer.raise_for_status().json())


async def agreed_cells(daemons: Sequence[Daemon]) -> int:
    """Return how many cells the daemons have agreed on, hints included; 0 while they have not."""
    chains = [await chain(daemon) for daemon in daemons]
    return chains[0]["cells"] if len({each["table_digest"] for each in chains}) == 1 else 0


@pytest.mark.soak  # some epochs have to pass
@pytest.mark.timeout(1200)
async def test_what_daemons_measured_and_agreed_on_teaches_them_and_a_newcomer(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    import_model(str(write_llama(tmp_path / "tiny.gguf", TINY)), ModelStore(cache), name="tiny")
    flags = ("--serve", "tiny", "--cache-dir", str(cache), "--epoch", str(MEASURING_EPOCH_S), "--threads", "2")
    first = await start_daemon(*flags)
    members = [first, *[await start_daemon(*flags, "--bootstrap", first.multiaddr) for _ in range(2)]]

    async def have_measured() -> bool:
        return await agreed_cells(members) >= 1

    agreements: dict[int, str] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(record_agreements, first, agreements)
        await until(have_measured, timeout_s=600)
        assert any([(await chain(daemon))["measured"] for daemon in members])
        # One that has measured nothing, with other figures: half of the threads.
        one_thread = (*flags[:-1], "1", "--bootstrap", first.multiaddr, "--exploration", "0")
        newcomer = await start_daemon(*one_thread)

        async def explains_by_table() -> bool:
            explained = await explain(newcomer)
            return explained["table_digest"] in agreements.values() and explained["selection"]["basis"] == "model"

        await until(explains_by_table, timeout_s=TRAINING_LIMIT_S)
        assert (await chain(newcomer))["measured"] == 0

        async def job_is_decided_by_table() -> bool:
            """Whether all votes on a job were learned from the same agreed table."""
            answer = await newcomer.complete(model="tiny", prompt="Once", max_tokens=8, metaswarm={"ignore_eos": True})
            consensus = answer["metaswarm"]["consensus"]
            return consensus["table_digest"] in agreements.values()

        await until(job_is_decided_by_table, timeout_s=TRAINING_LIMIT_S)
        nursery.cancel_scope.cancel()
