"""Scores of GGUF packages are the log probabilities of llama.cpp over the whole published file."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType

from node.engine.interface import EngineOptions
from node.engine.llamacpp.context import PASS_ROWS, SequenceRows
from node.engine.llamacpp.graph_variant import GRAPHS
from node.engine.llamacpp.shard import LLAMACPP
from tests.unit.engine.driving import InProcess, decode
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, VOCABULARY, write_model
from tests.unit.engine.llamacpp.packages import GgufFiles, write_package
from tests.unit.engine.llamacpp.test_graphs import quantised
from tests.unit.engine.test_scoring import score, wanted

PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, 2 * PASS_ROWS + 5).tolist()


def alone(files: GgufFiles) -> npt.NDArray[Any]:
    """Return the log probabilities that llama.cpp gives to each token behind its first."""
    rows = SequenceRows(0, 0, np.array(PROMPT, np.int32), len(PROMPT))
    [logits] = files.alone().context.run([rows])
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs: npt.NDArray[Any] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores: npt.NDArray[Any] = logprobs[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    return scores


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
async def test_spans_score_as_llamacpp_does(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    files = write_package(write_model(architecture, tmp_path / "model.gguf"), tmp_path / "package")
    logprobs, tokens = alone(files), files.alone().decode(PROMPT, 4)
    for cuts in ([], [architecture.granularity]):
        engines = [InProcess(shard) for shard in files.shards(cuts)]
        for chunk in (33, len(PROMPT)):
            found = await score(engines, PROMPT, wanted(PROMPT, max_tokens=1), LLAMACPP, chunk)
            assert [each.token for each in found] == [*PROMPT[1:], tokens[0]]
            assert [each.logprob for each in found[:-1]] == pytest.approx(logprobs, abs=1e-4), f"cut at {cuts}"
        assert await decode(engines, PROMPT, 4, variant=LLAMACPP) == tokens, "texts are as before"


async def test_graphs_score_nearly_the_same(tmp_path: Path) -> None:
    files, _ = quantised("llama3", tmp_path, GGMLQuantizationType.Q8_0)
    options = EngineOptions(threads=1, kv_positions=1024, cache_dir=tmp_path / "cache")
    engines = [InProcess(shard) for shard in files.shards([2], options)]
    for engine in engines:
        await engine.prepare(GRAPHS)
    found = [each.logprob for each in await score(engines, PROMPT, wanted(PROMPT), GRAPHS, 33)]
    assert np.abs(np.array(found) - alone(files)).mean() < 0.05
