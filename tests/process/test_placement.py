"""Block placement with real daemons: a spare peer fills the gap that a killed one leaves."""

from pathlib import Path

import trio

from node.models.store import Package
from node.stages.memory_admission import span_bytes_for
from protocol.identity import BlockRange
from tests.process.daemons import MODEL, Daemon, StartDaemon, is_complete, until

RECOVERY_S = 120.0
"""For failure detection, planning, settling and loading on a busy machine."""


async def test_spare_peer_moves_to_blocks_of_killed_peer(
    start_daemon: StartDaemon, package: Package, tmp_path: Path
) -> None:
    manifest = package.manifest
    memory_bytes = max(span_bytes_for(manifest, half) for half in (BlockRange(0, 15), BlockRange(15, 30)))
    first = await start_daemon("--serve", f"{MODEL}:0-15", "--threads", "1")
    joined: dict[str, Daemon] = {}

    async def join(name: str, *flags: str) -> None:
        joined[name] = await start_daemon(*flags, "--threads", "1", "--bootstrap", first.multiaddr)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(join, "second", "--serve", f"{MODEL}:15-30")
        nursery.start_soon(join, "spare", "--serve", MODEL, "--memory", str(memory_bytes))
    second, spare = joined["second"], joined["spare"]
    await until(lambda: is_complete(first))

    async def blocks_of_spare() -> list[tuple[int, int]]:
        return [(span["start"], span["end"]) for span in (await spare.get("/swarm/status"))["spans"]]

    [(start, end)] = await blocks_of_spare()
    assert end - start >= 15, "the memory of the larger half may hold a block more of the other"
    before = await first.complete(prompt="The capital of France is", max_tokens=8)
    # Half of the blocks are the spare's; whoever has the other half is lost.
    lost, hole = (second, BlockRange(15, 30)) if start == 0 else (first, BlockRange(0, 15))
    keeper = first if lost is second else second
    await lost.kill()

    async def fills_the_hole() -> bool:
        return all(start <= hole.start and hole.end <= end for start, end in await blocks_of_spare())

    await until(fills_the_hole, RECOVERY_S)
    await until(lambda: is_complete(keeper))
    after = await keeper.complete(prompt="The capital of France is", max_tokens=8)
    assert after["choices"][0]["text"] == before["choices"][0]["text"]
    assert {stage["peer"] for stage in after["metaswarm"]["route"]} == {keeper.peer_id, spare.peer_id}
