import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock

from node.engine.interface import source_from_package
from node.models import blobs, fetching, library, sources
from node.models.blobs import BlobServer, ModelFetcher
from node.models.errors import ModelError
from node.models.eviction import evict_for
from node.models.fetching import Blob, FetchError, fetch_blob
from node.models.files import MIN_FREE_BYTES
from node.models.gguf_file import read_gguf
from node.models.importer import import_model
from node.models.library import ANNOUNCED_AGAIN_S, provide_loop
from node.models.store import ModelStore, Package
from node.models.verification_record import RECORD_FILE
from node.network.interface import Network, Stream, StreamClosed, Way
from node.testing.memory_links import LinkModel
from node.testing.memory_network import MemoryNetworkHub
from protocol.blobs import PROTOCOL_ID, BlobBusy, BlobFound, BlobInitiator, BlobMissing, BlobRequest, BlobResponder
from protocol.framing import FrameType, encode_chunks, encode_frame
from protocol.identity import BlockRange, PeerId, peer_id_from_public_key
from tests.unit.models.checkpoints import write_checkpoint
from tests.unit.models.gguf_files import write_gguf

Handler = Callable[[Stream], Awaitable[None]]

CONTENT = random.Random(0).randbytes(1_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@asynccontextmanager
async def swarm(*handlers: Handler) -> AsyncIterator[tuple[Network, list[PeerId]]]:
    """Run a client's network, connected to one peer for each handler; yield it and their ids, in order."""
    hub = MemoryNetworkHub(random.Random(0), LinkModel(latency_s=0.0))
    client = hub.network(peer_id_from_public_key(bytes(32)))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(client.running())
        peers = []
        for number, handler in enumerate(handlers, 1):
            network = hub.network(peer_id_from_public_key(bytes([number]) * 32))
            network.set_stream_handler(PROTOCOL_ID, handler)
            await stack.enter_async_context(network.running())
            peers.append(await client.connect(network.multiaddrs[0]))
        yield client, peers


async def serve(
    stream: Stream,
    *,
    content: bytes = CONTENT,
    size: int | None = None,
    stop_after: int | None = None,
    answer: BlobBusy | BlobMissing | None = None,
    requests: list[BlobRequest] | None = None,
) -> None:
    """Serve `content` as whatever is asked for; claim another size, break off, or refuse if told to."""
    responder = BlobResponder()
    while data := await stream.receive_some():
        for request in responder.receive_data(data):
            if requests is not None:
                requests.append(request)
            if answer is not None:
                await stream.send_all(responder.answer(answer))
                continue
            claimed = len(content) if size is None else size
            await stream.send_all(responder.answer(BlobFound(size=claimed, length=request.available(claimed))))
            body = content[request.offset :][: request.available(claimed)]
            for frame in responder.send_data(body[:stop_after]) if body else ():
                await stream.send_all(frame)
            if stop_after is not None:
                return


async def no_providers(sha256: str) -> tuple[PeerId, ...]:
    """Find no further holders of a file."""
    return ()


wrong = partial(serve, content=bytes(len(CONTENT)))


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "block-000.safetensors"


def part_of(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.part")


def is_whole(path: Path) -> bool:
    return path.read_bytes() == CONTENT


def is_there(path: Path) -> bool:
    return path.exists()


def delete(path: Path) -> None:
    path.unlink()


async def fetch(client: Network, peers: list[PeerId], destination: Path) -> fetching.Fetched:
    with trio.fail_after(20):
        return await fetch_blob(client, peers, Blob(SHA256, len(CONTENT), destination))


async def test_fetch_gives_the_whole_file_and_counts_bytes(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", 400_000)
    requests: list[BlobRequest] = []
    async with swarm(partial(serve, requests=requests)) as (client, peers):
        fetched = await fetch(client, peers, destination)
    assert is_whole(destination)
    assert fetched.bytes_by_peer == {peers[0]: len(CONTENT)}
    assert fetched.bad_peers == {}
    assert [request.offset for request in requests] == [0, 400_000, 800_000, 1_200_000]
    assert {path.name for path in destination.parent.iterdir()} == {destination.name, RECORD_FILE}


async def test_fetch_resumes_at_its_part_file(destination: Path) -> None:
    requests: list[BlobRequest] = []
    first, second = partial(serve, stop_after=600_000), partial(serve, requests=requests)
    async with swarm(first, second) as (client, peers):
        with pytest.raises(FetchError, match="ended the stream too early"):
            await fetch(client, peers[:1], destination)
        assert not is_there(destination)
        assert part_of(destination).stat().st_size == 600_000
        fetched = await fetch(client, peers[1:], destination)
    assert is_whole(destination)
    assert [request.offset for request in requests] == [600_000]
    assert fetched.bytes_by_peer == {peers[1]: 900_000}


async def test_fetch_fails_over_to_the_next_peer(destination: Path) -> None:
    async with swarm(partial(serve, stop_after=600_000), serve) as (client, peers):
        fetched = await fetch(client, peers, destination)
    assert is_whole(destination)
    assert fetched.bytes_by_peer == {peers[0]: 600_000, peers[1]: 900_000}
    assert fetched.bad_peers == {}


async def test_peer_with_wrong_bytes_is_blamed_and_the_next_one_asked(destination: Path) -> None:
    async with swarm(wrong, serve) as (client, peers):
        fetched = await fetch(client, peers, destination)
    assert is_whole(destination)
    assert list(fetched.bad_peers) == [peers[0]]


async def test_corrupting_peer_is_identified_among_several_sources(destination: Path) -> None:
    liar = partial(serve, content=bytes(len(CONTENT)), stop_after=600_000)
    async with swarm(liar, serve) as (client, peers):
        fetched = await fetch(client, peers, destination)
    assert is_whole(destination)
    assert peers[1] not in fetched.bad_peers


async def test_corrupting_peer_among_honest_ones_does_not_prevent_the_fetch(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", 600_000)

    async def one_wrong_range_then_busy(stream: Stream) -> None:
        responder = BlobResponder()
        answered = False
        while data := await stream.receive_some():
            for request in responder.receive_data(data):
                if answered:
                    await stream.send_all(responder.answer(BlobBusy()))
                    continue
                length = request.available(len(CONTENT))
                await stream.send_all(responder.answer(BlobFound(size=len(CONTENT), length=length)))
                for frame in responder.send_data(bytes(length)):
                    await stream.send_all(frame)
                answered = True

    async with swarm(one_wrong_range_then_busy, serve) as (client, peers):
        await fetch(client, peers, destination)
    assert is_whole(destination)


async def test_corrupt_part_file_is_discarded(destination: Path) -> None:
    for leftover in (bytes(1000), bytes(len(CONTENT)), bytes(len(CONTENT) + 1)):
        part_of(destination).write_bytes(leftover)
        async with swarm(serve) as (client, peers):
            fetched = await fetch(client, peers, destination)
        assert is_whole(destination)
        assert fetched.bad_peers == {}
        delete(destination)


async def test_wrong_bytes_from_all_peers_leave_no_file(destination: Path) -> None:
    async with swarm(wrong, wrong) as (client, peers):
        with pytest.raises(FetchError, match=r"cannot fetch block-000\.safetensors from any of 2 peers"):
            await fetch(client, peers, destination)
    assert not is_there(destination)
    assert part_of(destination).stat().st_size == 0


async def flood(stream: Stream) -> None:
    """Announce the right range and then send without end."""
    responder = BlobResponder()
    (request,) = responder.receive_data(await stream.receive_some())
    await stream.send_all(responder.answer(BlobFound(size=len(CONTENT), length=request.available(len(CONTENT)))))
    while True:
        for frame in encode_chunks(bytes(100_000)):
            await stream.send_all(frame)


async def garbage(stream: Stream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n" * 100)


async def unasked(stream: Stream) -> None:
    await stream.receive_some()
    await stream.send_all(encode_frame(FrameType.CHUNK, b"x" * 1000))


LIARS: dict[str, Handler] = {
    "a larger file": partial(serve, size=len(CONTENT) + 1),
    "a smaller file": partial(serve, size=len(CONTENT) - 1),
    "an enormous file": partial(serve, size=64 << 30),
    "more bytes than promised": flood,
    "garbage": garbage,
    "bytes before the answer": unasked,
}


@pytest.mark.parametrize("liar", LIARS.values(), ids=LIARS)
async def test_oversized_answer_costs_one_try_and_bounded_disk(destination: Path, liar: Handler) -> None:
    async with swarm(liar) as (client, peers):
        with pytest.raises(FetchError):
            await fetch(client, peers, destination)
        assert part_of(destination).stat().st_size <= len(CONTENT)
        assert not is_there(destination)
    async with swarm(liar, serve) as (client, peers):
        fetched = await fetch(client, peers, destination)
    assert is_whole(destination)
    assert peers[0] in fetched.bad_peers
    assert peers[1] not in fetched.bad_peers


async def test_silent_peer_times_out(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "STALL_S", 0.05)

    async def silent(stream: Stream) -> None:
        await trio.sleep_forever()

    async with swarm(silent, serve) as (client, peers):
        fetched = await fetch(client, peers, destination)
    assert fetched.bytes_by_peer == {peers[1]: len(CONTENT)}
    assert fetched.bad_peers == {}


async def test_slow_peer_times_out(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "RANGE_S", 0.2)

    async def drip(stream: Stream) -> None:
        responder = BlobResponder()
        (request,) = responder.receive_data(await stream.receive_some())
        await stream.send_all(responder.answer(BlobFound(size=len(CONTENT), length=request.available(len(CONTENT)))))
        for byte in CONTENT:
            await stream.send_all(encode_chunks(bytes([byte]))[0])
            await trio.sleep(0.01)

    async with swarm(drip, serve) as (client, peers):
        fetched = await fetch(client, peers, destination)
    assert is_whole(destination)
    assert fetched.bytes_by_peer[peers[0]] < 100


async def test_fetch_skips_peers_without_the_file_and_retries_busy_ones(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "BUSY_BACKOFF_S", (0.01, 0.01))
    asked = 0

    async def busy_at_first(stream: Stream) -> None:
        nonlocal asked
        asked += 1
        await serve(stream, answer=BlobBusy() if asked < 3 else None)

    async with swarm(partial(serve, answer=BlobMissing()), busy_at_first) as (client, peers):
        fetched = await fetch(client, peers, destination)
        assert asked == 3
        assert fetched.bytes_by_peer == {peers[1]: len(CONTENT)}
        delete(destination)
        asked = -10
        with pytest.raises(FetchError, match="is busy"):
            await fetch(client, peers, destination)


class BehindRelays:
    """A client's network, some of whose peers are reached through a relay, as each connection shows."""

    def __init__(self, network: Network, relayed: set[PeerId], announced: set[PeerId]) -> None:
        self._network = network
        self._relayed = relayed
        self._announced = announced
        self._dialled: set[PeerId] = set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def way_to(self, peer: PeerId) -> Way | None:
        if peer not in self._dialled:
            return None
        return Way(relay=PeerId("relay")) if peer in self._relayed else Way()

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        relay = f"/ip4/8.8.8.8/tcp/1/p2p/{peer}/p2p-circuit/p2p/{peer}"
        return (f"/ip4/192.168.1.2/tcp/1/p2p/{peer}", *([relay] if peer in self._announced else ()))

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        self._dialled.add(peer)
        return await self._network.open_stream(peer, *protocols)


@pytest.mark.parametrize("announced", [False, True])
async def test_relay_carries_a_file_only_where_no_direct_peer_gives_it(destination: Path, announced: bool) -> None:
    requests: list[BlobRequest] = []
    async with swarm(partial(serve, requests=requests), serve, partial(serve, answer=BlobMissing())) as (client, peers):
        relayed, direct, lacking = peers
        network = BehindRelays(client, {relayed}, {relayed} if announced else set())
        fetched = await fetch(network, [relayed, lacking, direct], destination)  # type: ignore[arg-type]
        assert fetched.bytes_by_peer == {direct: len(CONTENT)}
        assert not requests
        delete(destination)
        network = BehindRelays(client, {relayed}, {relayed} if announced else set())
        fetched = await fetch(network, [relayed, lacking], destination)  # type: ignore[arg-type]
        assert fetched.bytes_by_peer == {relayed: len(CONTENT)}


async def test_direct_holder_that_is_busy_gets_time_before_a_relay_carries_a_file(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "BUSY_BACKOFF_S", (0.01,) * 4)
    left = 3

    async def busy_at_first(stream: Stream) -> None:
        nonlocal left
        left -= 1
        await serve(stream, answer=BlobBusy() if left >= 0 else None)

    async with swarm(serve, busy_at_first) as (client, (relayed, direct)):
        network = BehindRelays(client, {relayed}, {relayed})
        fetched = await fetch(network, [relayed, direct], destination)  # type: ignore[arg-type]
        assert fetched.bytes_by_peer == {direct: len(CONTENT)}
        delete(destination)
        left = 100
        network = BehindRelays(client, {relayed}, {relayed})
        fetched = await fetch(network, [relayed, direct], destination)  # type: ignore[arg-type]
        assert fetched.bytes_by_peer == {relayed: len(CONTENT)}


async def test_without_peers_the_line_says_so(destination: Path) -> None:
    async with swarm() as (client, _):
        with pytest.raises(FetchError, match="no peer is known to have it"):
            await fetch(client, [client.peer_id], destination)


async def test_concurrent_fetches_of_a_file_fetch_it_once(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_LOCK_POLL_S", 0.01)
    requests: list[BlobRequest] = []
    async with swarm(partial(serve, requests=requests)) as (client, peers), trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(fetch, client, peers, destination)
    assert is_whole(destination)
    assert len(requests) == 1


async def test_a_disk_that_fails_is_one_clear_line(tmp_path: Path) -> None:
    async with swarm(serve) as (client, peers):
        with pytest.raises(ModelError, match=r"cannot store block-000\.safetensors"):
            await fetch(client, peers, tmp_path / "nowhere" / "block-000.safetensors")


@pytest.fixture
def package(tmp_path: Path) -> Package:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / "tokenizer.json").write_text("{}")
    return import_model(str(folder), ModelStore(tmp_path / "server"))


@pytest.fixture
def server(tmp_path: Path, package: Package) -> BlobServer:
    return BlobServer(ModelStore(tmp_path / "server"))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "client")


async def test_empty_cache_is_filled_from_peers(package: Package, server: BlobServer, store: ModelStore) -> None:
    async with swarm(server.handle, server.handle) as (client, peers):
        fetcher = ModelFetcher(client, store, no_providers)
        with trio.fail_after(20):
            mine = await fetcher.fetch_manifest(package.model_id, peers)
            assert mine.manifest == package.manifest
            await fetcher.fetch_files(mine.manifest, mine.manifest.tokenizer_files, peers)
            assert next(file.name for file in mine.missing()) == "embed.safetensors"
            reports: list[tuple[int, int]] = []
            fetched = await fetcher.fetch_files(
                mine.manifest,
                mine.manifest.files_for(BlockRange(1, 3)),
                peers,
                lambda stage, done, total: reports.append((done, total)),
            )
    hashed: list[int] = []  # again: what was hashed when it came is not at the next start
    store.verify(package.model_id, progress=lambda _stage, done, _total: hashed.append(done), rehash=False)
    assert hashed == []
    verification = store.verify(package.model_id)
    assert verification.corrupt == ()
    assert verification.missing == ("embed.safetensors", "block-000.safetensors")
    expected = package.manifest.bytes_of(BlockRange(1, 3))
    assert fetched.bytes_by_peer.total() == expected
    assert set(fetched.bytes_by_peer) == set(peers)
    assert reports[-1] == (expected, expected)
    all_bytes = expected + len(package.manifest.data) + sum(f.size_bytes for f in package.manifest.tokenizer_files)
    assert sum(fetcher.fetched.bytes_by_peer.values()) == all_bytes
    assert server.served_bytes == all_bytes


async def test_span_of_a_gguf_package_comes_with_its_common_file(
    tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "find_granularity", lambda *_: 1)
    monkeypatch.setattr(sources, "make_gguf_tokenizer", lambda _source, folder, _progress: folder.mkdir())
    package = import_model(str(write_gguf(tmp_path / "tiny.gguf")), ModelStore(tmp_path / "server"))
    server, last = BlobServer(ModelStore(tmp_path / "server")), BlockRange(1, 2)
    async with swarm(server.handle, server.handle) as (client, peers):
        fetcher = ModelFetcher(client, store, no_providers)
        with trio.fail_after(20):
            mine = await fetcher.fetch_manifest(package.model_id, peers)
            await fetcher.fetch_files(mine.manifest, mine.missing(last), peers)
    assert store.verify(package.model_id).missing == ("embed.gguf", "block-000.gguf")
    assert mine.missing(last) == ()
    common = source_from_package(mine, last).common_file
    assert common is not None
    assert read_gguf(common).metadata["llama.block_count"] == 2
    first = package.manifest.files_for(BlockRange(0, 1))
    evicted = evict_for(store, mine, first, package.manifest.size_bytes - 1)
    assert evicted
    assert common not in evicted, "every span needs it"


async def test_files_are_fetched_only_where_the_disk_has_room_for_all(
    package: Package, server: BlobServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = package.manifest.files_for(BlockRange(0, 3))
    needed = sum(file.size_bytes for file in files)
    free = MIN_FREE_BYTES + needed - 1
    monkeypatch.setattr("node.models.files.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    async with swarm(server.handle) as (client, peers):
        fetcher = ModelFetcher(client, store, no_providers)
        with pytest.raises(ModelError, match=r"needs \d+ MiB, and \d+ MiB are free beyond the reserve of 64 MiB in /"):
            await fetcher.fetch_files(package.manifest, files, peers)
        assert store.get(package.model_id).present() == frozenset()
        # What an earlier fetch left of a file need not be fetched.
        part_of(store.get(package.model_id).path_of(files[0])).write_bytes(package.path_of(files[0]).read_bytes()[:1])
        await fetcher.fetch_files(package.manifest, files, peers)
    assert store.verify(package.model_id, BlockRange(0, 3)).missing == ()


async def test_present_files_are_not_fetched_again(package: Package, server: BlobServer, store: ModelStore) -> None:
    async with swarm(server.handle) as (client, peers):
        fetcher = ModelFetcher(client, store, no_providers)
        await fetcher.fetch_files(package.manifest, package.manifest.files_for(BlockRange(0, 3)), peers)
        served_bytes = server.served_bytes
        assert (await fetcher.fetch_manifest(package.model_id, [])).missing(BlockRange(0, 3)) == ()
        fetched = await fetcher.fetch_files(package.manifest, package.manifest.files_for(BlockRange(0, 3)), [])
        assert fetched.bytes_by_peer == {}
        assert server.served_bytes == served_bytes


async def test_a_forged_manifest_is_refused(package: Package, server: BlobServer, store: ModelStore) -> None:
    forger = partial(serve, content=package.manifest.data.replace(b'"size":', b'"size":1'))
    async with swarm(forger, garbage, partial(serve, content=b""), server.handle) as (client, peers):
        fetcher = ModelFetcher(client, store, no_providers)
        with pytest.raises(FetchError, match="no peer has the manifest"):
            await fetcher.fetch_manifest(package.model_id, peers[:3])
        assert store.list() == ()
        assert (await fetcher.fetch_manifest(package.model_id, peers)).model_id == package.model_id
        assert peers[0] in fetcher.fetched.bad_peers


async def test_file_without_source_fails_the_fetch_in_one_line(
    package: Package, server: BlobServer, store: ModelStore
) -> None:
    (package.path / "block-001.safetensors").unlink()
    async with swarm(server.handle) as (client, peers):
        with pytest.raises(FetchError, match=r"cannot fetch block-001\.safetensors .*does not have the file"):
            await ModelFetcher(client, store, no_providers).fetch_files(
                package.manifest, package.manifest.files_for(BlockRange(0, 3)), peers
            )


async def test_missing_file_is_fetched_from_peers_that_announce_it(
    package: Package, server: BlobServer, store: ModelStore
) -> None:
    lacking = partial(serve, answer=BlobMissing())
    asked: list[str] = []
    async with swarm(lacking, server.handle) as (client, peers):

        async def holders(sha256: str) -> list[PeerId]:
            asked.append(sha256)
            return peers

        fetched = await ModelFetcher(client, store, holders).fetch_files(
            package.manifest, package.manifest.files_for(BlockRange(1, 2)), peers[:1]
        )
    assert store.verify(package.model_id, BlockRange(1, 2)).missing == ()
    assert asked == [package.manifest.blocks[1].sha256]
    assert set(fetched.bytes_by_peer) == {peers[1]}


async def test_manifest_comes_from_a_peer_that_announces_it_and_serves_nothing(
    package: Package, server: BlobServer, store: ModelStore
) -> None:
    async with swarm(server.handle) as (client, peers):

        async def holders(sha256: str) -> list[PeerId]:
            return peers if sha256 == package.model_id else []

        fetcher = ModelFetcher(client, store, holders)
        mine = await fetcher.fetch_manifest(package.model_id, [])
        await fetcher.fetch_files(mine.manifest, mine.manifest.files_for(BlockRange(1, 2)), [])
    assert store.verify(package.model_id, BlockRange(1, 2)).missing == ()


async def test_files_are_reannounced_before_their_records_expire(
    package: Package, virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    virtual_clock.autojump_threshold = 0.05  # the files are looked at in a thread, which no virtual time waits for
    monkeypatch.setattr(library, "ANNOUNCE_ROUND_S", ANNOUNCED_AGAIN_S / 4)
    async with swarm(serve) as (client, _), trio.open_nursery() as nursery:
        announced: list[bytes] = []
        monkeypatch.setattr(client, "provide", note(announced))
        nursery.start_soon(provide_loop, client, ModelStore(package.path.parents[1]))
        await trio.sleep(ANNOUNCED_AGAIN_S / 2)
        files = (*package.manifest.tokenizer_files, *package.manifest.weight_files)
        hashes = [bytes.fromhex(sha256) for sha256 in (package.model_id, *(file.sha256 for file in files))]
        assert announced == list(dict.fromkeys(hashes))
        await trio.sleep(ANNOUNCED_AGAIN_S)
        assert announced == 2 * list(dict.fromkeys(hashes))
        nursery.cancel_scope.cancel()


def note(announced: list[bytes]) -> Callable[[bytes], Awaitable[None]]:
    """Return what stands for `Network.provide` and writes down what is announced."""

    async def provide(key: bytes) -> None:
        announced.append(key)

    return provide


async def ask(client: Network, peer: PeerId, request: BlobRequest) -> list[object]:
    stream = await client.open_stream(peer, PROTOCOL_ID)
    initiator = BlobInitiator()
    await stream.send_all(initiator.request(request))
    events: list[object] = []
    while not initiator.idle:
        events += initiator.receive_data(await stream.receive_some())
    await stream.aclose()
    return events


async def test_blob_server_refuses_missing_files_and_excess_transfers(
    package: Package, server: BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm(server.handle) as (client, peers):
        nothing = BlobRequest(sha256="0" * 64, offset=0, length=1)
        assert await ask(client, peers[0], nothing) == [BlobMissing()]
        embed = package.manifest.embed
        past_the_end = BlobRequest(sha256=embed.sha256, offset=embed.size_bytes + 5, length=5)
        assert await ask(client, peers[0], past_the_end) == [BlobFound(size=embed.size_bytes, length=0)]
        monkeypatch.setattr(blobs, "MAX_TRANSFERS_PER_PEER", 0)
        assert await ask(client, peers[0], nothing) == [BlobBusy()]
        monkeypatch.undo()
        assert await ask(client, peers[0], nothing) == [BlobMissing()]


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 100, encode_frame(FrameType.CHUNK, b"x"), encode_frame(FrameType.CONTROL, b"\x80")],
    ids=["noise", "a file that nobody asked for", "an empty request"],
)
async def test_garbage_resets_only_its_own_stream(package: Package, server: BlobServer, data: bytes) -> None:
    async with swarm(server.handle) as (client, peers):
        stream = await client.open_stream(peers[0], PROTOCOL_ID)
        await stream.send_all(data)
        with trio.fail_after(5), pytest.raises(StreamClosed):
            await stream.receive_some()
        good = BlobRequest(sha256=package.model_id, offset=0, length=10)
        assert (await ask(client, peers[0], good))[0] == BlobFound(size=len(package.manifest.data), length=10)
