"""Three real daemons agree on one statement; a fourth that comes later verifies it and goes by the same table."""

import time
from typing import Any

from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, until

EPOCH_S = 6
FLAGS = ("--epoch", str(EPOCH_S))


async def chain(daemon: Daemon) -> dict[str, Any]:
    """Return what a daemon says of the chain of the only model."""
    found: list[dict[str, Any]] = (await daemon.get("/swarm/status"))["consensus"]
    return found[0] if found else {"epoch": None, "statement": None, "members": 0}


async def test_daemons_agree_and_late_one_adopts_chain(start_daemon: StartDaemon) -> None:
    first = await start_daemon("--serve", f"{MODEL}:0-10", *FLAGS)
    others = [
        await start_daemon("--serve", f"{MODEL}:{blocks}", "--bootstrap", first.multiaddr, *FLAGS)
        for blocks in ("10-20", "20-30")
    ]
    daemons = [first, *others]

    async def have_agreed() -> bool:
        chains = [await chain(daemon) for daemon in daemons]
        return len({each["statement"] for each in chains}) == 1 and chains[0]["members"] == 3

    await until(have_agreed, timeout_s=90)
    newcomer = await start_daemon("--bootstrap", others[1].multiaddr, *FLAGS)
    began_s = time.monotonic()

    async def has_adopted() -> bool:
        adopted, standing = await chain(newcomer), await chain(first)
        return adopted["statement"] is not None and adopted["statement"] == standing["statement"]

    await until(has_adopted, timeout_s=20)
    print(f"adopted after {time.monotonic() - began_s:.1f} s")

    async def is_ready() -> bool:
        return await is_complete(newcomer)

    await until(is_ready)
    answer = await newcomer.complete(prompt="Once", max_tokens=2, metaswarm={"ignore_eos": True})
    consensus = answer["metaswarm"]["consensus"]
    adopted = await chain(newcomer)
    assert adopted["weight"] is None
    assert consensus["epoch"] is not None
    assert len(consensus["table_digest"]) == 64
