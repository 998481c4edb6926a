"""Model files between peers: serves those in the cache, and completes packages with what others have."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import trio

from node.models.errors import ModelError
from node.models.fetching import Fetched, FetchError, fetch_blob, fetch_manifest_bytes
from node.models.files import Progress, ignore_progress, size_of
from node.models.manifest import FileEntry, Manifest, parse_manifest
from node.models.store import ModelStore, Package
from node.network.interface import Network, NetworkError, Stream
from protocol.blobs import BlobBusy, BlobFound, BlobMissing, BlobRequest, BlobResponder
from protocol.identity import BlockRange, ModelId, PeerId

MAX_TRANSFERS: Final = 32
"""Ranges that a server sends at a time; a request beyond them is answered `busy`."""
MAX_TRANSFERS_PER_PEER: Final = 8
MAX_READS: Final = 4
"""Pieces of files that a server reads at a time, each in a thread and of at most a frame's size."""
PARALLEL_FILES: Final = 4
"""Files of a package that are fetched at a time."""
IDLE_S: Final = 60.0
"""A stream on which nothing is asked for so long is closed by the server."""

_PIECE_BYTES: Final = 512 << 10
_MAX_PEERS_COUNTED: Final = 4096


Holders = Callable[[str], Awaitable[Sequence[PeerId]]]
"""Looks up who has the file with a sha256."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BlobStatistics:
    """What a server has done so far. `bytes_by_peer` has the peers that fetched last."""

    transfers: int
    requests: int
    bytes_by_peer: Mapping[PeerId, int]


class BlobServer:
    """Serves the files of a store to whoever knows their sha256."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._reads = trio.CapacityLimiter(MAX_READS)
        self._transfers: Counter[PeerId] = Counter()
        self._requests = 0
        self._bytes_by_peer: dict[PeerId, int] = {}

    def statistics(self) -> BlobStatistics:
        """Return what has been served."""
        return BlobStatistics(self._transfers.total(), self._requests, dict(self._bytes_by_peer))

    async def handle(self, stream: Stream) -> None:
        """Serve one stream until its end. Raises RemoteProtocolError and NetworkError, which end this stream only."""
        responder = BlobResponder()
        while True:
            with trio.move_on_after(IDLE_S) as idle:
                data = await stream.receive_some()
            if idle.cancelled_caught:
                return
            for request in responder.receive_data(data):
                self._requests += 1
                await self._answer(stream, responder, request)
            if not data:
                return

    async def _answer(self, stream: Stream, responder: BlobResponder, request: BlobRequest) -> None:
        peer = stream.peer
        if self._transfers.total() >= MAX_TRANSFERS or self._transfers[peer] >= MAX_TRANSFERS_PER_PEER:
            await stream.send_all(responder.answer(BlobBusy()))
            return
        self._transfers[peer] += 1
        try:
            path = await trio.to_thread.run_sync(self._store.path_by_sha256, request.sha256, limiter=self._reads)
            if path is None:
                await stream.send_all(responder.answer(BlobMissing()))
            else:
                await self._send(stream, responder, request, path)
        finally:
            self._transfers[peer] -= 1
            if not self._transfers[peer]:
                del self._transfers[peer]

    async def _send(self, stream: Stream, responder: BlobResponder, request: BlobRequest, path: Path) -> None:
        size = await trio.to_thread.run_sync(size_of, path, limiter=self._reads)
        if size is None:
            await stream.send_all(responder.answer(BlobMissing()))
            return
        left = request.available(size)
        await stream.send_all(responder.answer(BlobFound(size=size, length=left)))
        offset = request.offset
        while left:
            piece = await trio.to_thread.run_sync(
                _read_piece, path, offset, min(left, _PIECE_BYTES), limiter=self._reads
            )
            if not piece:
                raise NetworkError(f"{path.name} was removed or cut while it was served")
            for frame in responder.send_data(piece):
                await stream.send_all(frame)
            offset, left = offset + len(piece), left - len(piece)
            self._count(stream.peer, len(piece))

    def _count(self, peer: PeerId, sent: int) -> None:
        total = self._bytes_by_peer.pop(peer, 0) + sent
        self._bytes_by_peer[peer] = total
        if len(self._bytes_by_peer) > _MAX_PEERS_COUNTED:
            del self._bytes_by_peer[next(iter(self._bytes_by_peer))]


class ModelFetcher:
    """Completes packages in a store with what peers have. Concurrent calls, also of other processes, do no harm."""

    def __init__(self, network: Network, store: ModelStore, holders: Holders) -> None:
        """Fetch nothing yet; `holders` finds peers that have a file, where those that are asked first have not."""
        self._network = network
        self._store = store
        self._holders = holders
        self._total = Fetched()

    @property
    def bytes_by_peer(self) -> Mapping[PeerId, int]:
        """Bytes of model files received so far, by the peer that sent them."""
        return dict(self._total.bytes_by_peer)

    @property
    def bad_peers(self) -> Mapping[PeerId, str]:
        """Peers that sent wrong bytes or broke the protocol, and what they did."""
        return dict(self._total.bad_peers)

    async def fetch_manifest(self, model: ModelId, peers: Sequence[PeerId]) -> Package:
        """Return the model's package from the store or, begun with the manifest that a peer has, from the swarm.

        Raises FetchError when no peer has it.
        """
        package = await trio.to_thread.run_sync(self._store.find, model)
        if package is not None:
            return package
        data, fetched = await fetch_manifest_bytes(self._network, peers, model)
        self._total.add(fetched)
        return await trio.to_thread.run_sync(self._store.add_manifest, parse_manifest(data))

    async def fetch_tokenizer(
        self, manifest: Manifest, peers: Sequence[PeerId], progress: Progress = ignore_progress
    ) -> Fetched:
        """Fetch the tokenizer files that are missing. Raises FetchError and ModelError."""
        return await self._fetch(manifest, manifest.tokenizer_files, peers, progress)

    async def fetch_files(
        self, manifest: Manifest, blocks: BlockRange, peers: Sequence[PeerId], progress: Progress = ignore_progress
    ) -> Fetched:
        """Fetch the weight files of a span that are missing, several at a time. Raises FetchError and ModelError."""
        return await self._fetch(manifest, manifest.files_for(blocks), peers, progress)

    async def _fetch(
        self, manifest: Manifest, files: Sequence[FileEntry], peers: Sequence[PeerId], progress: Progress
    ) -> Fetched:
        package = await trio.to_thread.run_sync(self._store.add_manifest, manifest)
        missing = [file for file in files if not package.has(file)]
        total, done = sum(file.size_bytes for file in missing), 0
        result, failures = Fetched(), list[ModelError]()
        slots = trio.CapacityLimiter(PARALLEL_FILES)

        def count(received: int) -> None:
            nonlocal done
            done += received
            progress("fetch from peers", min(max(done, 0), total), total)

        async def fetch(number: int, file: FileEntry) -> None:
            # Each file begins with another peer, so that the load spreads.
            start = number % len(peers) if peers else 0
            order = (*peers[start:], *peers[:start])
            async with slots:
                if failures:
                    return
                try:
                    result.add(await self._fetch_file(package, file, order, count))
                except ModelError as error:
                    failures.append(error)

        started_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number, file in enumerate(missing):
                nursery.start_soon(fetch, number, file)
        if failures:
            raise failures[0]
        if missing:
            _logger.info(
                "files fetched from peers",
                model=manifest.model_id,
                files=len(missing),
                seconds=round(trio.current_time() - started_s, 2),
                bytes_by_peer={str(peer): received for peer, received in result.bytes_by_peer.items()},
            )
        return result

    async def _fetch_file(
        self, package: Package, file: FileEntry, peers: Sequence[PeerId], count: Callable[[int], None]
    ) -> Fetched:
        """Fetch a file from the peers of its model, else from whoever has announced it."""
        target = package.path_of(file)
        try:
            return await fetch_blob(self._network, peers, file.sha256, file.size_bytes, target, count, self._total)
        except FetchError:
            others = [peer for peer in await self._holders(file.sha256) if peer not in peers]
            if not others:
                raise
        return await fetch_blob(self._network, others, file.sha256, file.size_bytes, target, count, self._total)


def _read_piece(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError:  # removed this moment, or the disk fails: nothing can be said of the bytes
        return b""
