"""A model that no node could hold: fetched from the peer that has its files, and placed by each node's memory."""

from functools import partial
from pathlib import Path

import trio

from node.models.gguf_file import read_gguf
from node.models.importer import import_model
from node.models.store import ModelStore
from node.stages.memory_admission import span_bytes_for
from protocol.identity import BlockRange
from tests.process.daemons import StartDaemon, is_complete, until
from tests.support.random_llama import LlamaShape, write_llama
from tests.unit.engine.llamacpp.packages import GgufFiles

SHAPE = LlamaShape(blocks=12, hidden=256, inner=512, heads=8, kv_heads=2, vocabulary=640)
NODES = 3
PROMPT = [2 + 7 * number % 90 for number in range(16)]
TOKENS = 16


async def test_small_nodes_choose_and_fetch_their_blocks_of_a_gguf_model(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    source = write_llama(tmp_path / "random.gguf", SHAPE)
    store = ModelStore(tmp_path / "cache")
    package = import_model(str(source), store)
    ends = BlockRange(0, 5), BlockRange(8, 12)
    memory_bytes = max(span_bytes_for(package.manifest, blocks) for blocks in ends)
    assert memory_bytes < span_bytes_for(package.manifest, BlockRange(0, 7))
    holder = await start_daemon("--cache-dir", str(tmp_path / "cache"))
    model = package.manifest.model_id

    async def start(number: int) -> None:
        flags = ("--serve", model, "--memory", str(memory_bytes), "--threads", "1", "--bootstrap", holder.multiaddr)
        await start_daemon(*flags, "--cache-dir", str(tmp_path / f"cache-{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(NODES):
            nursery.start_soon(start, number)
    await until(partial(is_complete, holder), timeout_s=100)
    answer = await holder.complete(model=model, prompt=PROMPT, max_tokens=TOKENS, metaswarm={"ignore_eos": True})
    alone = GgufFiles(read_gguf(source), package.path).alone()
    assert answer["metaswarm"]["token_ids"] == alone.decode(PROMPT, TOKENS)
    assert len(answer["metaswarm"]["route"]) == NODES
