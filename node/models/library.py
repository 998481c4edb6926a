"""The models available here: named by the user, found in the cache, at peers or in the catalogue."""

from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Protocol

import structlog
import trio
from cachetools import LRUCache

from node.models.blobs import BlobServer, ModelFetcher
from node.models.catalogue import CATALOGUE, catalogued_as
from node.models.errors import ModelError
from node.models.eviction import evict_for, evict_packages, in_use, mark_used
from node.models.files import Progress, ignore_progress
from node.models.importer import import_model
from node.models.manifest import Manifest
from node.models.parts import WHOLE, Selection
from node.models.source_index import source_of_model
from node.models.store import DamagedModelError, ModelStore, Package, UnknownModelError
from node.models.tokenizer_service import ModelTokenizer, TokenizerService
from node.network.interface import Network, NetworkError
from protocol.announcements import blob_provider_key
from protocol.blobs import PROTOCOL_ID
from protocol.identity import BlockRange, ModelId, PeerId
from protocol.limits import MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH

MAX_OPEN_MODELS = 8
"""Models whose vocabularies stay in memory."""

MANIFEST_POLL_S = 2.0
"""Interval of looking up named models that are not here yet."""

RETRY_S = 30.0
"""Before a manifest that no peer gave is requested again."""

ANNOUNCED_AGAIN_S = 12 * 3600.0
"""The records of the DHT live for a day at least."""

ANNOUNCE_PACE_S = 2.0
"""Between two announcements, each of which asks many peers; who finds a model's manifest asks its holder for files."""

ANNOUNCE_ROUND_S = 10.0
"""How often new files are looked for."""

MAX_ANNOUNCED = 4096
"""Files that one node announces."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model as a coordinator needs it: without weights, to describe a job and decode its tokens."""

    id: ModelId
    name: str
    manifest: Manifest
    tokenizer: ModelTokenizer

    @property
    def block_count(self) -> int:
        """Blocks of the whole model."""
        return self.manifest.block_count

    @property
    def hidden_size(self) -> int:
        """Elements of a row of hidden states, or the most there can be where the model does not say."""
        return self.manifest.hidden_size or MAX_WIDTH

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return self.manifest.vocabulary_size or MAX_VOCABULARY

    @property
    def max_positions(self) -> int:
        """The longest text in tokens."""
        return self.manifest.max_positions or MAX_POSITIONS


@dataclass(slots=True)
class _Opening:
    """A model that is being opened, for concurrent callers."""

    over: trio.Event = field(default_factory=trio.Event)
    failure: str = ""


@dataclass(frozen=True, slots=True)
class BlobTraffic:
    """Bytes of model files received from each peer, and sent to all of them."""

    received_bytes: Mapping[PeerId, int]
    served_bytes: int


class Swarm(Protocol):
    """Knows which peers have which models; `node.swarm.membership` is the real one."""

    def served_models(self) -> tuple[ModelId, ...]:
        """Return the models that live peers serve."""

    async def providers(self, model: ModelId) -> tuple[PeerId, ...]:
        """Return peers that serve a part of a model, and so have its manifest."""

    async def holders(self, sha256: str) -> tuple[PeerId, ...]:
        """Return peers that announce a file, whatever they serve."""


class Library:
    """Finds models by name or id, and fetches their missing files.

    A model is fetched only if it is in the catalogue, which pins its id, or the user has named it: in a request, in the
    configuration, or by a local name. `cache_limit_bytes`: for weight files from peers.
    """

    def __init__(
        self,
        store: ModelStore,
        network: Network,
        swarm: Swarm,
        *,
        cache_limit_bytes: int | None = None,
        tokenizers: TokenizerService | None = None,
    ) -> None:
        self._tokenizers = tokenizers or TokenizerService()
        self._opening: dict[ModelId, _Opening] = {}
        self._store = store
        self._cache_limit_bytes = cache_limit_bytes
        self._swarm = swarm
        self._network = network
        self._fetcher = ModelFetcher(network, store, swarm.holders)
        self._server = BlobServer(store)
        self._open: LRUCache[ModelId, KnownModel] = LRUCache(MAX_OPEN_MODELS)
        network.set_stream_handler(PROTOCOL_ID, self._server.handle)

    def transfers(self) -> BlobTraffic:
        """Return the traffic of the blob protocol so far."""
        return BlobTraffic(dict(self._fetcher.fetched.bytes_by_peer), self._server.served_bytes)

    def local_models(self) -> tuple[ModelId, ...]:
        """Return the models of which at least the manifest is here."""
        return tuple(package.model_id for package in self._store.list())

    def local_manifest(self, model: ModelId) -> Manifest | None:
        """Return a model's manifest if it is here."""
        with suppress(ModelError):
            return self._store.get(model).manifest
        return None

    def name_of(self, model: ModelId) -> str:
        """Return what to call a model."""
        return self._store.name_of(model)

    async def run(self) -> None:
        """Announce the files here, and fetch manifests of named models that peers serve, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tokenizers.run)
            nursery.start_soon(provide_loop, self._network, self._store)
            nursery.start_soon(self._fetch_manifests)

    async def _fetch_manifests(self) -> None:
        retry_s: dict[ModelId, float] = {}
        while True:
            for model in self.named_models().intersection(self._swarm.served_models()):
                if self.local_manifest(model) is not None or retry_s.get(model, 0.0) > trio.current_time():
                    continue
                try:
                    await self._package(model)
                except ModelError as error:
                    retry_s[model] = trio.current_time() + RETRY_S
                    _logger.info("manifest unavailable", model=model, reason=str(error))
            await trio.sleep(MANIFEST_POLL_S)

    def named_models(self) -> set[ModelId]:
        """Return the models of the catalogue, and those that the user named."""
        named = {entry.model_id for entry in CATALOGUE.values()}
        with suppress(ModelError):
            named |= set(self._store.names().values())
        return named

    async def open(self, text: str) -> KnownModel:
        """Return the model that a name or id means, with its tokenizer. Raises ModelError."""
        model = self._store.resolve(text, self._swarm.served_models())
        while (opening := self._opening.get(model)) is not None:  # by another task, which may be cancelled
            await opening.over.wait()
            if opening.failure:
                raise ModelError(opening.failure)
        mark_used(self._store, model)
        known = self._open.get(model)
        if known is not None and self._has_tokenizer(known.manifest):
            return known
        opening = self._opening[model] = _Opening()
        try:
            known = await self._load(model)
        except ModelError as error:
            opening.failure = str(error)
            raise
        finally:
            del self._opening[model]
            opening.over.set()
        self._open[model] = known
        return known

    def _has_tokenizer(self, manifest: Manifest) -> bool:
        """Return whether a model's tokenizer is still here: another process may have evicted the package."""
        package = self._store.find(manifest.model_id)
        return package is not None and all(map(package.has, manifest.tokenizer_files))

    async def _load(self, model: ModelId) -> KnownModel:
        if self.local_manifest(model) is None and model not in self.named_models():
            kept, room = frozenset(self._open), len(self._opening)
            for evicted in await trio.to_thread.run_sync(evict_packages, self._store, kept, room):
                _logger.info("model evicted from the cache", model=evicted)
        package = await self._package(model)
        if not self._has_tokenizer(package.manifest):
            await self._fetcher.fetch_files(
                package.manifest, package.manifest.tokenizer_files, await self._providers(model)
            )
        return KnownModel(model, self.name_of(model), package.manifest, await self._tokenizers.open(package))

    async def manifest(self, text: str, *, use_catalogue: bool, progress: Progress = ignore_progress) -> Manifest:
        """Return the manifest of the model that a name or id means, from cache, peer or catalogue."""
        model = self._store.resolve(text, self._swarm.served_models())
        try:
            return (await self._package(model)).manifest
        except ModelError:
            name = catalogued_as(model)
            if not use_catalogue or name is None:
                raise
        return (await self._import(name, progress)).manifest

    async def weights(
        self, manifest: Manifest, blocks: BlockRange, *, use_catalogue: bool, progress: Progress = ignore_progress
    ) -> Package:
        """Return a package with the verified files of a span.

        Missing or damaged ones come from peers, else from the model's source: the catalogue, or the hub repository that
        it was imported from. Files that were verified before and have not changed since are not hashed again. Raises
        ModelError with one line for the user.
        """
        model = manifest.model_id
        package = self._store.get(model)
        found = await trio.to_thread.run_sync(partial(self._store.verify, model, blocks, progress, rehash=False))
        for name in found.corrupt:
            _logger.warning("damaged model file deleted, fetching it again", model=model, file=name)
            await trio.to_thread.run_sync(self._store.discard, model, name)
        if blocks.end == manifest.block_count:
            await self._fetch_tokenizer(package)
        if not found.missing and not found.corrupt:
            return package
        wanted = manifest.files_for(blocks)
        for path in await trio.to_thread.run_sync(evict_for, self._store, package, wanted, self._cache_limit_bytes):
            _logger.info("model file evicted from the cache", file=str(path))
        try:
            await self._fetcher.fetch_files(manifest, wanted, await self._providers(model), progress)
        except ModelError:
            source = self._source_of(model)
            if not use_catalogue or source is None:
                raise
            selection = WHOLE if source in CATALOGUE else Selection(blocks=blocks, manifest=manifest)
            return await self._import(source, progress, selection)
        return package

    async def _fetch_tokenizer(self, package: Package) -> None:
        """Fetch the tokenizer, which texts that follow a JSON Schema need; the span can be served without it."""
        manifest = package.manifest
        if self._has_tokenizer(manifest):
            return
        try:
            await self._fetcher.fetch_files(
                manifest, manifest.tokenizer_files, await self._providers(manifest.model_id)
            )
        except ModelError as error:
            _logger.info("no tokenizer: texts cannot follow a JSON Schema", model=manifest.model_id, reason=str(error))

    @asynccontextmanager
    async def in_use(self, package: Package, blocks: BlockRange) -> AsyncIterator[None]:
        """Protect the files of a span from eviction inside the block. Raises ModelError."""
        with ExitStack() as stack:
            protected = in_use(package, package.manifest.files_for(blocks))
            await trio.to_thread.run_sync(stack.enter_context, protected)  # it may wait for another process
            yield

    def lacking_bytes(self, manifest: Manifest) -> int:
        """Return the total size of a model's missing files."""
        return sum(file.size_bytes for file in self._store.get(manifest.model_id).missing())

    async def _package(self, model: ModelId) -> Package:
        try:
            return self._store.get(model)
        except (UnknownModelError, DamagedModelError):
            return await self._fetcher.fetch_manifest(model, await self._providers(model))

    async def _providers(self, model: ModelId) -> tuple[PeerId, ...]:
        """Return whom to ask for a model's files first: peers that serve it, else those that only have its manifest."""
        return await self._swarm.providers(model) or await self._swarm.holders(model)

    def _source_of(self, model: ModelId) -> str | None:
        """Return what a model can be imported from: its catalogue name, or a commit of a hub repository."""
        return catalogued_as(model) or source_of_model(self._store.cache_dir, model)

    async def _import(self, source: str, progress: Progress, wanted: Selection = WHOLE) -> Package:
        def report(stage: str, done: int, total: int) -> None:
            trio.from_thread.check_cancelled()
            progress(stage, done, total)

        return await trio.to_thread.run_sync(partial(import_model, source, self._store, wanted=wanted, progress=report))


async def provide_loop(network: Network, store: ModelStore) -> None:
    """Announce every file of the store in the DHT, again before it is forgotten, until cancelled.

    So peers find them also at peers that do not serve the model. A record there outlives its peer by hours; a file from
    it is verified by its hash.
    """
    announced_s: dict[str, float] = {}
    while True:
        present: tuple[str, ...] = ()
        if network.connected_peers():
            try:
                present = await trio.to_thread.run_sync(store.file_hashes)
            except ModelError as error:
                _logger.warning("files not announced", reason=str(error))
        kept, now_s = frozenset(present), trio.current_time()
        announced_s = {sha256: when_s for sha256, when_s in announced_s.items() if sha256 in kept}
        due = (each for each in present[:MAX_ANNOUNCED] if announced_s.get(each, -inf) + ANNOUNCED_AGAIN_S <= now_s)
        if (sha256 := next(due, None)) is not None:
            try:
                await network.provide(blob_provider_key(sha256))
            except NetworkError as error:
                _logger.debug("file not announced", sha256=sha256, reason=str(error))
            else:
                announced_s[sha256] = now_s
                await trio.sleep(ANNOUNCE_PACE_S)
                continue
        await trio.sleep(ANNOUNCE_ROUND_S)
