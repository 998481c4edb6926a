"""Three daemons agree on one statement; a fourth joins later, verifies the chain and uses the same table."""

from typing import Any

import trio

from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, until

EPOCH_S = 6
FLAGS = ("--epoch", str(EPOCH_S))


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
        await trio.sleep(EPOCH_S / 30)


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

            Maybe none: an epoch is too short here to measure a cell in it.
            """
            answer = await newcomer.complete(prompt="Once", max_tokens=2, metaswarm={"ignore_eos": True})
            digests = {vote["table_digest"] for vote in answer["metaswarm"]["consensus"]["votes"]}
            return digests <= {*agreements.values(), None}

        await until(votes_follow, timeout_s=60)
        nursery.cancel_scope.cancel()
    adopted = await chain(newcomer)
    assert adopted["weight"] is None
    assert adopted["members"] == 3
