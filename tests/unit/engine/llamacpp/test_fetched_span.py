"""A peer that has nothing but the manifest fetches the files of a span of a GGUF package, and runs it."""

from pathlib import Path

import pytest
import trio

from node.engine.interface import EngineOptions, source_from_package
from node.engine.llamacpp.shard import LLAMACPP, LlamaShard
from node.models import sources
from node.models.blobs import BlobServer, ModelFetcher
from node.models.gguf_file import read_gguf
from node.models.importer import import_model
from node.models.store import ModelStore, Package
from protocol.identity import BlockRange
from tests.unit.engine.driving import InProcess, decode
from tests.unit.engine.llamacpp.packages import Alone, GgufFiles
from tests.unit.models.gguf_files import tensors, write_gguf
from tests.unit.models.test_blobs import no_providers, swarm

PROMPT = [5, 40, 17, 88, 23, 61]


def engine(package: Package, blocks: BlockRange) -> InProcess:
    source = source_from_package(package, blocks)
    return InProcess(LlamaShard(source, blocks, EngineOptions(threads=1, kv_positions=256)))


@pytest.mark.parametrize("tied", [True, False])
async def test_fetched_span_gives_the_tokens_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    monkeypatch.setattr(sources, "find_granularity", lambda *_: 1)
    monkeypatch.setattr(sources, "make_gguf_tokenizer", lambda _source, folder, _progress: folder.mkdir())
    file = write_gguf(tmp_path / "tiny.gguf", weights=tensors(output=not tied), quantised="ffn")
    package = import_model(str(file), ModelStore(tmp_path / "server"))
    server, last = BlobServer(ModelStore(tmp_path / "server")), BlockRange(1, 2)
    async with swarm(server.handle) as (client, peers):
        fetcher = ModelFetcher(client, ModelStore(tmp_path / "client"), no_providers)
        with trio.fail_after(20):
            fetched = await fetcher.fetch_manifest(package.model_id, peers)
            await fetcher.fetch_files(fetched.manifest, fetched.missing(last), peers)
    assert fetched.manifest.blocks[0] in fetched.missing()
    route = [engine(package, BlockRange(0, 1)), engine(fetched, last)]
    alone = Alone(GgufFiles(read_gguf(file), package.path))
    assert await decode(route, PROMPT, 12, variant=LLAMACPP) == alone.decode(PROMPT, 12)
