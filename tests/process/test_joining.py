"""A node that has nothing but a bootstrap address becomes a stage: weights come from peers, each file verified."""

from pathlib import Path

import trio

from node.models.store import Package
from node.stages.memory_admission import span_bytes_for
from protocol.identity import BlockRange
from tests.process.daemons import MODEL, StartDaemon, is_complete, until

JOIN_LIMIT_S = 60.0
"""Of a machine on which much else may run."""


def cache_with(package: Package, folder: Path, blocks: tuple[int, ...]) -> Path:
    """Make a cache folder with its own links to a package's files; the last byte of some blocks is flipped."""
    target = folder / "models" / package.model_id
    target.mkdir(parents=True)
    for file in package.path.iterdir():
        (target / file.name).hardlink_to(file)
    for block in blocks:
        damaged = target / package.manifest.blocks[block].name
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.unlink()
        damaged.write_bytes(data)
    return folder


async def test_node_with_empty_disk_fetches_blocks_from_peers_and_serves(
    start_daemon: StartDaemon, package: Package, tmp_path: Path
) -> None:
    manifest = package.manifest
    third = manifest.blocks[10:20]
    third_bytes = sum(file.size_bytes for file in third)
    memory_bytes = span_bytes_for(manifest, BlockRange(10, 20))
    # Both have every file on disk, whatever they serve, and give what they have. What a node serves it has checked
    # itself; damaged are files that one of them has and does not serve.
    damaged = cache_with(package, tmp_path / "damaged", blocks=(12, 17))
    first = await start_daemon("--serve", f"{MODEL}:0-10", environment={"METASWARM_CACHE_DIR": str(damaged)})
    second = await start_daemon("--serve", f"{MODEL}:20-30", "--bootstrap", first.multiaddr)
    empty = tmp_path / "empty cache"
    with trio.fail_after(JOIN_LIMIT_S):
        newcomer = await start_daemon(
            *("--serve", MODEL, "--memory", str(memory_bytes), "--no-catalogue"),
            *("--bootstrap", first.multiaddr, "--bootstrap", second.multiaddr),
            environment={"METASWARM_CACHE_DIR": str(empty)},
        )
    status = await newcomer.get("/swarm/status")
    assert [(span["start"], span["end"]) for span in status["spans"]] == [(10, 20)]
    received = status["transfers"]["received_bytes"]
    assert set(received) == {first.peer_id, second.peer_id}
    assert min(received.values()) > third_bytes / 10
    assert sum(received.values()) > third_bytes, "what was wrong was fetched once more"
    for file in third:
        assert (empty / "models" / package.model_id / file.name).read_bytes() == package.path_of(file).read_bytes()
    await until(lambda: is_complete(first))
