"""Model files between peers: serves those in the cache, and completes packages from other peers' caches."""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from node.models.cache_checks import missing_bytes
from node.models.errors import ModelError
from node.models.fetching import Blob, Fetched, FetchError, fetch_blob, fetch_manifest_bytes
from node.models.files import MIN_FREE_BYTES, Progress, check_space, disk_errors, ignore_progress, size_of
from node.models.manifest import FileEntry, Manifest, parse_manifest
from node.models.store import ModelStore, Package
from node.network.interface import Network, NetworkError, Stream
from protocol.blobs import BlobBusy, BlobFound, BlobMissing, BlobRequest, BlobResponder
from protocol.identity import ModelId, PeerId

MAX_TRANSFERS: Final = 32
"""Ranges that a server sends at a time; a request beyond them is answered `busy`."""
MAX_TRANSFERS_PER_PEER: Final = 8
MAX_READS: Final = 4
"""Pieces of files that a server reads at a time, each in a thread and of at most a frame's size."""
PARALLEL_FILES: Final = 4
"""Files of a package that are fetched at a time."""
IDLE_S: Final = 60.0
"""A stream without a request for so long is closed by the server."""

_PIECE_BYTES: Final = 512 << 10

Holders = Callable[[str], Awaitable[Sequence[PeerId]]]
"""Looks up who has the file with a sha256."""

_logger = structlog.get_logger(__name__)


class BlobServer:
    """Serves the files of a store by their sha256."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._reads = trio.CapacityLimiter(MAX_READS)
        self._transfers: Counter[PeerId] = Counter()
        self.served_bytes = 0

    async def handle(self, stream: Stream) -> None:
        """Serve one stream until its end. Raises RemoteProtocolError and NetworkError, which end this stream only."""
        responder = BlobResponder()
        while True:
            with trio.move_on_after(IDLE_S) as idle:
                data = await stream.receive_some()
            if idle.cancelled_caught:
                return
            for request in responder.receive_data(data):
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
            size = None if path is None else await trio.to_thread.run_sync(size_of, path, limiter=self._reads)
            if path is None or size is None:
                await stream.send_all(responder.answer(BlobMissing()))
            else:
                await self._send(stream, responder, request, path, size)
        finally:
            self._transfers[peer] -= 1
            if not self._transfers[peer]:
                del self._transfers[peer]

    async def _send(
        self, stream: Stream, responder: BlobResponder, request: BlobRequest, path: Path, size: int
    ) -> None:
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
            self.served_bytes += len(piece)


class ModelFetcher:
    """Completes packages in a store from peers; `holders` finds more peers with a file when those asked first fail.

    Concurrent calls, also of other processes, do no harm.
    """

    def __init__(self, network: Network, store: ModelStore, holders: Holders) -> None:
        self._network = network
        self._store = store
        self._holders = holders
        self.fetched = Fetched()
        """The account of all fetches."""

    async def fetch_manifest(self, model: ModelId, peers: Sequence[PeerId]) -> Package:
        """Return the model's package from the store or, begun with the manifest that a peer has, from the swarm.

        Raises FetchError when no peer has it.
        """
        package = await trio.to_thread.run_sync(self._store.find, model)
        if package is not None:
            return package
        try:
            data = await fetch_manifest_bytes(self._network, peers, model, self.fetched)
        except FetchError:
            if not (others := await self._others(peers, model)):
                raise
            data = await fetch_manifest_bytes(self._network, others, model, self.fetched)
        return await trio.to_thread.run_sync(self._store.add_manifest, parse_manifest(data))

    async def fetch_files(
        self,
        manifest: Manifest,
        files: Sequence[FileEntry],
        peers: Sequence[PeerId],
        progress: Progress = ignore_progress,
    ) -> Fetched:
        """Fetch those of the files that are missing, several at a time. Raises FetchError and ModelError.

        Nothing is fetched where the disk has no room for all of them.
        """
        package = await trio.to_thread.run_sync(self._store.add_manifest, manifest)
        missing = [file for file in files if not package.has(file)]
        await trio.to_thread.run_sync(_check_space, package, missing)
        total, done = sum(file.size_bytes for file in missing), 0
        result, failures = Fetched(self.fetched), list[ModelError]()
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
                    await self._fetch_file(package, file, order, count, result)
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
        self, package: Package, file: FileEntry, peers: Sequence[PeerId], count: Callable[[int], None], fetched: Fetched
    ) -> None:
        """Fetch a file from the peers of its model, else from those that announce it, or its model's manifest."""
        blob = Blob(file.sha256, file.size_bytes, package.path_of(file))
        try:
            await fetch_blob(self._network, peers, blob, count, fetched)
        except FetchError:
            others = await self._others(peers, file.sha256) or await self._others(peers, package.model_id)
            if not others:
                raise
            await fetch_blob(self._network, others, blob, count, fetched)

    async def _others(self, asked: Sequence[PeerId], sha256: str) -> list[PeerId]:
        return [peer for peer in await self._holders(sha256) if peer not in asked]


def _check_space(package: Package, files: Sequence[FileEntry]) -> None:
    with disk_errors("cannot tell how much space is free"):
        lacking = missing_bytes(package, files)
        check_space(package.path, lacking, reserve=MIN_FREE_BYTES if lacking else 0)


def _read_piece(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError:  # removed this moment, or the disk fails
        return b""
