"""Tiny random models of each architecture give the whole model's logits at every cut that their granularity admits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from node.engine.interface import EngineOptions
from node.engine.llamacpp.granularity import find_granularity
from node.engine.llamacpp.shard import LLAMACPP
from node.engine.shard import Array
from node.models.gguf_file import read_gguf
from protocol.identity import BlockRange
from tests.unit.engine.driving import AnyEngine, InProcess, Part, decode, session
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, VOCABULARY, write_model
from tests.unit.engine.llamacpp.jobs import decode_cached, decode_drafted, decode_replayed, decode_together
from tests.unit.engine.llamacpp.packages import write_package

PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, 30).tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_admissible_cuts_change_nothing(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    files = write_package(write_model(architecture, tmp_path / "model.gguf"), tmp_path / "package")
    alone = files.alone()
    wanted, tokens = alone.logits(PROMPT, outputs=len(PROMPT)), alone.decode(PROMPT, 12)
    assert len(set(tokens)) > 3, "a text that repeats itself proves little"
    cuts = range(architecture.granularity, architecture.blocks, architecture.granularity)
    for chosen in ([], list(cuts), *([cut] for cut in cuts)):
        shards = files.shards(chosen)
        rows: Array = np.array(PROMPT)
        for shard in shards:
            rows = shard.run_alone(LLAMACPP, rows, draws=len(PROMPT))
        assert np.abs(rows - wanted).max() == 0.0
        assert await decode([InProcess(shard) for shard in shards], PROMPT, 12, chunk=13, variant=LLAMACPP) == tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_batches_prefixes_drafts_and_replays_change_nothing(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    path = write_model(architecture, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    files = write_package(path, tmp_path / "package")
    alone, longest = files.alone(), [*PROMPT, *PROMPT[::-1]]
    prompts = [longest[: 5 + 7 * number] for number in range(8)]
    wanted = [alone.decode(prompt, 24) for prompt in prompts]
    assert len({token for text in wanted for token in text}) > 12, "texts that repeat themselves prove little"
    cuts = range(architecture.granularity, architecture.blocks, architecture.granularity)
    cut = [InProcess(shard) for shard in files.shards(list(cuts))]
    assert await decode_together(cut, prompts, 24) == wanted
    assert await decode_drafted(cut, session(8), prompts[3], wanted[3]) == wanted[3]
    assert await decode_replayed(cut, session(8), prompts[4], 24) == wanted[4]
    found = [await decode_cached(cut, session(20 + number), prompts[7], 24) for number in range(2)]
    assert found == [(0, wanted[7]), (32, wanted[7])]


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_overlapping_spans_are_left_where_the_next_begins(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    files = write_package(write_model(architecture, tmp_path / "model.gguf"), tmp_path / "package")
    tokens = files.alone().decode(PROMPT, 12)
    [whole] = map(InProcess, files.shards([]))
    for cut in range(architecture.granularity, architecture.blocks, architecture.granularity):
        rest = InProcess(files.shards([cut])[1])
        for first in (whole, *(InProcess(files.shards([end])[0]) for end in range(cut + 1, architecture.blocks))):
            route: list[AnyEngine] = [Part(first, BlockRange(0, cut)), rest]
            assert await decode(route, PROMPT, 12, chunk=13, variant=LLAMACPP) == tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_granularity_is_found_by_trying(name: str, tmp_path: Path) -> None:
    model = read_gguf(write_model(ARCHITECTURES[name], tmp_path / "model.gguf"))
    assert find_granularity(model, tmp_path) == ARCHITECTURES[name].granularity


def test_rotary_factors_do_not_depend_on_the_memory_of_a_span(tmp_path: Path) -> None:
    files = write_package(write_model(ARCHITECTURES["phi3"], tmp_path / "model.gguf"), tmp_path / "package")
    rows = np.array(PROMPT, np.int32)
    for options in (EngineOptions(threads=1, kv_positions=256), EngineOptions(threads=1, kv_positions=2048)):
        [shard] = files.shards([], options)
        logits = shard.run_alone(LLAMACPP, rows, draws=len(PROMPT))
        assert np.abs(logits - files.alone().logits(PROMPT, outputs=len(PROMPT))).max() == 0.0


async def test_longrope_reaches_beyond_the_original_context_as_in_llamacpp_alone(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["phi3"]
    files = write_package(write_model(architecture, tmp_path / "model.gguf"), tmp_path / "package")
    original, longest = (architecture.keys[k] for k in ("rope.scaling.original_context_length", "context_length"))
    assert original < 700 < longest
    text = np.random.default_rng(1).integers(0, VOCABULARY, 700).tolist()
    whole, within = files.alone(positions=longest), files.alone(positions=original)
    assert np.abs(whole.logits(text[:100]) - within.logits(text[:100])).max() > 0.01, "llama.cpp takes other factors"
    for cuts in ([], [2]):
        shards = files.shards(cuts)
        assert {shard.info.max_positions for shard in shards} == {longest}
        rows: Array = np.array(text)
        for shard in shards:
            rows = shard.run_alone(LLAMACPP, rows, draws=len(text))
        assert np.array_equal(rows, whole.logits(text, outputs=len(text)))
        assert await decode([InProcess(shard) for shard in shards], text, 8, variant=LLAMACPP) == whole.decode(text, 8)


def test_short_rotary_factors_stay_where_the_context_is_the_original_one(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["phi3"]
    short = replace(architecture, keys={**architecture.keys, "context_length": 512})
    files = write_package(write_model(short, tmp_path / "model.gguf"), tmp_path / "package")
    [shard] = files.shards([], EngineOptions(threads=1, kv_positions=1024))
    logits = shard.run_alone(LLAMACPP, np.array(PROMPT), draws=len(PROMPT))
    assert np.array_equal(logits, files.alone(positions=512).logits(PROMPT, outputs=len(PROMPT)))
