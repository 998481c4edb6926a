"""Embeddings of GGUF packages are those that llama.cpp pools itself over the whole published file."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from node.engine.interface import EngineOptions
from node.engine.llamacpp.context import PASS_ROWS, SequenceRows, _BatchArrays
from node.engine.llamacpp.graph_variant import GRAPHS
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.shard import LLAMACPP
from protocol.tensors import Pooling
from tests.unit.engine.driving import InProcess, decode
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, VOCABULARY, write_model
from tests.unit.engine.llamacpp.packages import GgufFiles, write_package
from tests.unit.engine.llamacpp.test_graphs import quantised
from tests.unit.engine.test_embeddings import embed

PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, PASS_ROWS - 5).tolist()
POOLING_TYPES = {Pooling.MEAN: 1, Pooling.LAST: 3}
"""Of llama.cpp."""


def embedded_alone(files: GgufFiles, prompt: Sequence[int], pooling: Pooling) -> list[float]:
    """Return what llama.cpp's own pooling gives, in one pass, with rounding as here."""
    library = load_library()
    alone = files.alone().context
    parameters = alone._parameters(256, is_watched=False)
    parameters.embeddings, parameters.pooling_type = True, POOLING_TYPES[pooling]
    context = library.llama_init_from_model(alone._model.handle, parameters)
    take = library._shared.llama_get_embeddings_seq
    take.restype, take.argtypes = ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p, ctypes.c_int32)
    batch = _BatchArrays(len(prompt), None)
    batch.fill([SequenceRows(0, 0, np.array(prompt, np.int32), len(prompt))], last=True)
    assert library.llama_decode(context, batch.batch) == 0
    found: list[float] = np.ctypeslib.as_array(take(context, 0), (alone._model.hidden_size,)).tolist()
    library.llama_free(context)
    return found


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
@pytest.mark.parametrize("pooling", Pooling)
async def test_spans_pool_as_llamacpp_does(name: str, pooling: Pooling, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    files = write_package(write_model(architecture, tmp_path / "model.gguf"), tmp_path / "package")
    wanted = embedded_alone(files, PROMPT, pooling)
    scale = max(map(abs, wanted))
    tokens = files.alone().decode(PROMPT, 8)
    for cuts in ([], [architecture.granularity]):
        engines = [InProcess(shard) for shard in files.shards(cuts)]
        for chunk in (33, len(PROMPT)):
            found = await embed(engines, PROMPT, pooling, LLAMACPP, chunk)
            assert found == pytest.approx(wanted, abs=1e-5 * scale), f"cut at {cuts}, {chunk} rows at a time"
        assert await decode(engines, PROMPT, 8, variant=LLAMACPP) == tokens, "texts are as before"


async def test_graphs_pool_nearly_the_same(tmp_path: Path) -> None:
    files, _ = quantised("llama3", tmp_path, GGMLQuantizationType.Q8_0)
    options = EngineOptions(threads=1, kv_positions=1024, cache_dir=tmp_path / "cache")
    engines = [InProcess(shard) for shard in files.shards([2], options)]
    for engine in engines:
        await engine.prepare(GRAPHS)
    wanted = np.array(embedded_alone(files, PROMPT, Pooling.MEAN))
    found = np.array(await embed(engines, PROMPT, Pooling.MEAN, GRAPHS, 33))
    assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.999
