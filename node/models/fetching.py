"""Fetches one file from peers by the blob protocol.

A peer may lie in every byte of it. What arrives is bounded by the size that the manifest states, and stays under a
temporary name until its sha256 is right.
"""

import hashlib
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import structlog
import trio

from node.models.errors import ModelError
from node.models.files import disk_errors, flush_directory, part_of, sha256_of, size_of, try_lock
from node.models.verification_record import FileStamp, VerificationRecord
from node.network.addresses import parse_address
from node.network.interface import Network, NetworkError, Stream
from protocol.blobs import PROTOCOL_ID, BlobBusy, BlobData, BlobInitiator, BlobMissing, BlobRequest
from protocol.errors import RemoteProtocolError
from protocol.identity import ModelId, PeerId
from protocol.limits import MAX_MANIFEST_BYTES

RANGE_BYTES: Final = 16 << 20
"""Of one request."""
STALL_S: Final = 15.0
"""A peer that sends nothing for so long during a transfer is given up."""
RANGE_S: Final = 600.0
"""Time limit of one request, however slowly the peer sends."""
BUSY_BACKOFF_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Backoff when every peer that may have a file is busy."""

_RECEIVE_BYTES: Final = 256 << 10
_LOCK_POLL_S: Final = 0.2

_logger = structlog.get_logger(__name__)


class FetchError(ModelError):
    """No peer could give the file."""


class Blob(NamedTuple):
    """A file to fetch."""

    sha256: str
    size_bytes: int
    destination: Path


@dataclass(slots=True)
class Fetched:
    """The account of a fetch, updated as it happens, also where it fails. `parent`: an account that includes it."""

    parent: "Fetched | None" = None
    bytes_by_peer: Counter[PeerId] = field(default_factory=Counter)
    bad_peers: dict[PeerId, str] = field(default_factory=dict)
    """Peers that sent wrong bytes or broke the protocol, and what they did."""

    def count(self, peer: PeerId, size: int) -> None:
        """Add bytes from a peer."""
        self.bytes_by_peer[peer] += size
        if self.parent is not None:
            self.parent.count(peer, size)

    def blame(self, peer: PeerId, reason: str) -> None:
        """Record a bad peer."""
        self.bad_peers[peer] = reason
        if self.parent is not None:
            self.parent.blame(peer, reason)


async def fetch_blob(
    network: Network,
    peers: Sequence[PeerId],
    blob: Blob,
    on_bytes: Callable[[int], None] = lambda _count: None,
    fetched: Fetched | None = None,
) -> Fetched:
    """Fetch a file from the first of the peers that can give it, and put it in place when its sha256 is right.

    What arrived before a failure or a crash stays beside the destination as `.<name>.part`, and the next fetch resumes
    there. `on_bytes` is called with the bytes gained, negative for bytes thrown away. Raises FetchError when no peer
    gives it, ModelError for a fault of the disk.
    """
    fetched = fetched or Fetched()
    with disk_errors(f"cannot store {blob.destination.name}"):
        async with _open_part(blob.destination, blob.size_bytes) as part:
            if part is not None:
                fetch = _Fetch(network, blob.sha256, part, on_bytes, fetched)
                await fetch.run([peer for peer in peers if peer != network.peer_id])
                await trio.to_thread.run_sync(part.put_in_place)
    return fetched


@dataclass(slots=True)
class _Part:
    """An incomplete file under a temporary name, locked against other fetches of it."""

    handle: int
    path: Path
    destination: Path
    size: int
    """Of the whole file."""
    have: int
    """Bytes received."""

    def append(self, data: memoryview) -> None:
        while data:
            written = os.pwrite(self.handle, data, self.have)
            self.have += written
            data = data[written:]

    def clear(self) -> None:
        os.ftruncate(self.handle, 0)
        self.have = 0

    def put_in_place(self) -> None:
        os.fsync(self.handle)
        self.path.replace(self.destination)
        VerificationRecord(self.destination.parent).add({self.destination.name: FileStamp.of(self.destination)})
        flush_directory(self.destination.parent)


@asynccontextmanager
async def _open_part(destination: Path, size: int) -> AsyncIterator[_Part | None]:
    """Open and lock the part file of a destination; None when the destination is there, perhaps after a wait."""
    path = part_of(destination)
    handle = -1
    try:
        while size_of(destination) != size:
            if handle < 0:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if try_lock(handle) and _is_open_file(path, handle):
                break
            # Another process fetches it, or has just put it in place: the open file is no longer the part file.
            os.close(handle)
            handle = -1
            await trio.sleep(_LOCK_POLL_S)
        if handle < 0 or size_of(destination) == size:
            yield None
            return
        yield _Part(handle, path, destination, size, os.fstat(handle).st_size)
    finally:
        if handle >= 0:
            os.close(handle)


@dataclass(slots=True)
class _Fetch:
    """One file on its way into its part file."""

    _network: Network
    _sha256: str
    _part: _Part
    _on_bytes: Callable[[int], None]
    _fetched: Fetched
    _sources: set[PeerId | None] = field(default_factory=set)
    """The sources of the part file; None stands for an earlier run's."""
    _from_one_peer: bool = False

    def __post_init__(self) -> None:
        if self._part.have:
            self._sources.add(None)
        self._on_bytes(self._part.have)

    async def run(self, peers: list[PeerId]) -> None:
        """Ask the peers in turn until the whole file is there and right; raise FetchError when no peer is left.

        Those that are reached through a relay last, as the relay would carry all of it; one that is busy and is reached
        directly gets time.
        """
        reason = "no peer is known to have it"
        asked = len(peers)
        delays = deque(BUSY_BACKOFF_S)
        while self._part.have < self._part.size or not await self._is_right(peers):
            queue = sorted(peers, key=self._is_relayed)
            direct_is_busy = False
            for number, peer in enumerate(queue):
                if direct_is_busy and len(delays) > 1 and self._is_relayed(peer):
                    continue
                is_first_time = peer not in queue[:number]
                direct_left = not all(map(self._is_relayed, queue[number + 1 :]))
                try:
                    if self._from_one_peer:
                        self._start_over()
                    done = await self._fetch_from(peer, unless_relayed=is_first_time and direct_left)
                    if done:
                        break
                    if done is None:
                        queue.append(peer)
                    elif not self._is_relayed(peer):
                        direct_is_busy = True
                    reason = f"{peer} is busy"
                except (NetworkError, RemoteProtocolError) as error:
                    reason = f"{peer}: {error}"
                    peers.remove(peer)
                    if isinstance(error, RemoteProtocolError):
                        self._blame(peer, str(error))
            else:
                if not peers or not delays:
                    name = self._part.destination.name
                    raise FetchError(f"cannot fetch {name} from any of {asked} peers; the last reason: {reason}")
                await trio.sleep(delays.popleft())

    async def _fetch_from(self, peer: PeerId, *, unless_relayed: bool) -> bool | None:
        """Fetch the rest from one peer; return False if it is busy. Raises when it fails or lacks the file.

        Returns None where a relay would carry it, if `unless_relayed`: only a connection shows that for certain.
        """

        async def store(data: memoryview) -> None:
            await trio.to_thread.run_sync(part.append, data)
            self._sources.add(peer)
            self._fetched.count(peer, len(data))
            self._on_bytes(len(data))

        part = self._part
        async with _blob_stream(self._network, peer) as stream:
            if unless_relayed and self._is_relayed(peer):
                return None
            initiator = BlobInitiator()
            while part.have < part.size:
                request = BlobRequest(
                    sha256=self._sha256, offset=part.have, length=min(part.size - part.have, RANGE_BYTES)
                )
                if not await _receive_range(stream, initiator, request, (part.size, part.size), store):
                    return False
        return True

    def _is_relayed(self, peer: PeerId) -> bool:
        """Return whether a peer is connected through a relay; without a connection, whether it will probably be."""
        if (way := self._network.way_to(peer)) is not None:
            return way.relay is not None
        known = [parse_address(each) for each in self._network.addresses_of(peer)]
        return any(each.relay for each in known) and not any(each.is_public for each in known if each.relay is None)

    async def _is_right(self, peers: list[PeerId]) -> bool:
        """Check the whole file's hash; when it is wrong, discard the file and blame its source if there is one."""
        if await trio.to_thread.run_sync(sha256_of, self._part.path) == self._sha256:
            return True
        for peer in self._sources if len(self._sources) == 1 else ():
            if peer is not None:
                self._blame(peer, "sent bytes that are not the file's")
                peers[:] = [other for other in peers if other != peer]
        # With several sources none can be blamed: from now on one peer gives all of it.
        self._from_one_peer = True
        self._start_over()
        return False

    def _start_over(self) -> None:
        self._on_bytes(-self._part.have)
        self._part.clear()
        self._sources = set()

    def _blame(self, peer: PeerId, reason: str) -> None:
        _logger.warning("invalid file received", peer=peer, sha256=self._sha256, reason=reason)
        self._fetched.blame(peer, reason)


async def fetch_manifest_bytes(network: Network, peers: Sequence[PeerId], model: ModelId, fetched: Fetched) -> bytes:
    """Return a manifest's bytes, which the model's id is the hash of, from the first peer that has it."""
    reason = "no peer is known to have it"
    for peer in (peer for peer in peers if peer != network.peer_id):
        try:
            return await _fetch_manifest_from(network, peer, model, fetched)
        except (NetworkError, RemoteProtocolError) as error:
            reason = f"{peer}: {error}"
            if isinstance(error, RemoteProtocolError):
                fetched.blame(peer, str(error))
    raise FetchError(f"no peer has the manifest of model {model[:12]}; the last reason: {reason}")


async def _fetch_manifest_from(network: Network, peer: PeerId, model: ModelId, fetched: Fetched) -> bytes:
    data = bytearray()

    async def store(piece: memoryview) -> None:
        data.extend(piece)

    request = BlobRequest(sha256=model, offset=0, length=MAX_MANIFEST_BYTES)
    async with _blob_stream(network, peer) as stream:
        complete = await _receive_range(stream, BlobInitiator(), request, (1, MAX_MANIFEST_BYTES), store)
    if not complete:
        raise NetworkError("it is busy")
    fetched.count(peer, len(data))
    if hashlib.sha256(data).hexdigest() != model:
        raise RemoteProtocolError("sent another manifest than it was asked for")
    return bytes(data)


async def _receive_range(
    stream: Stream,
    initiator: BlobInitiator,
    request: BlobRequest,
    size_limits: tuple[int, int],
    store: Callable[[memoryview], Awaitable[None]],
) -> bool:
    """Ask for a range and hand its bytes to `store`; return False when the peer is busy.

    `size_limits`: the least and most that the whole file may have. Raises NetworkError when the peer has not got it,
    stalls or is gone, RemoteProtocolError when it lies.
    """
    await stream.send_all(initiator.request(request))
    deadline = trio.current_time() + RANGE_S
    while not initiator.idle:
        try:
            with trio.fail_at(min(trio.current_time() + STALL_S, deadline)):
                data = await stream.receive_some(_RECEIVE_BYTES)
        except trio.TooSlowError:
            raise NetworkError("it was too slow") from None
        if not data:
            raise NetworkError("it ended the stream too early")
        for event in initiator.receive_data(data):
            if isinstance(event, BlobData):
                await store(event.data)
            elif isinstance(event, BlobBusy):
                return False
            elif isinstance(event, BlobMissing):
                raise NetworkError("it does not have the file")
            elif not size_limits[0] <= event.size <= size_limits[1]:
                raise RemoteProtocolError(f"states a wrong file size: {event.size} bytes")
    return True


@asynccontextmanager
async def _blob_stream(network: Network, peer: PeerId) -> AsyncIterator[Stream]:
    """Open a stream, which is closed after success and reset after failure. Raises NetworkError."""
    with trio.move_on_after(STALL_S) as dialling:
        stream = await network.open_stream(peer, PROTOCOL_ID)
    if dialling.cancelled_caught:
        raise NetworkError("it cannot be reached in time")
    try:
        yield stream
    except BaseException:
        with trio.CancelScope(shield=True):
            await stream.reset()
        raise
    await stream.aclose()


def _is_open_file(path: Path, handle: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False
