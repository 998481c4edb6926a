"""GGUF packages of the Llama family in onnxruntime: the file's own numbers, and nearly what llama.cpp calculates."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from node.engine.graphs import gguf_matrix
from node.engine.graphs.gguf_matrix import GgufMatrix
from node.engine.interface import EngineError, EngineOptions, KvCompatibilityKey, Prefix, SessionOptions, Variant
from node.engine.kv_allocator import EXPIRY_ROUNDS
from node.engine.llamacpp.graph_variant import GRAPHS
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.shard import LLAMACPP, LlamaShard
from node.engine.quality import measure_quality
from node.engine.shard import Array
from node.models.gguf_file import GgufTensor, read_gguf
from node.models.gguf_writer import GgufData, typed_metadata, write_gguf
from protocol.identity import BlockRange
from tests.unit.engine.driving import GREEDY, InProcess, decode, session, start, step
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, VOCABULARY, write_model
from tests.unit.engine.llamacpp.packages import GgufFiles, write_package
from tests.unit.engine.llamacpp.test_parity import TEXT
from tests.unit.engine.llamacpp.test_worker import mapped, two_spans

Q4_0, Q4_1, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, 30).tolist()
SCALES = {
    Q4_0: [0],
    Q4_1: [0, 2],
    GGMLQuantizationType.Q5_0: [0],
    GGMLQuantizationType.Q5_1: [0, 2],
    Q8_0: [0],
    GGMLQuantizationType.Q4_K: [0, 2],
    GGMLQuantizationType.Q5_K: [0, 2],
    GGMLQuantizationType.Q6_K: [208],
}
"""Where a block's numbers in f16 are."""

OFFSETS_IN_F32 = {GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K}


@pytest.mark.parametrize("kind", SCALES)
def test_elements_are_those_that_llamacpp_widens(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    random = np.random.default_rng(kind)
    outputs, inputs = 12, 512
    block_inputs, block_bytes = GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (outputs, inputs // block_inputs, block_bytes)).astype(np.uint8)
    for place in SCALES[kind]:
        numbers = random.standard_normal((*raw.shape[:2], 1)).astype(np.float16)
        raw[..., place : place + 2] = numbers.view(np.uint8)
    (tmp_path / "file").write_bytes(bytes(64) + raw.tobytes())
    matrix = GgufMatrix(GgufTensor("blk.0.attn_q.weight", (outputs, inputs), kind, tmp_path / "file", 64, raw.nbytes))
    assert matrix.quantisation is not None
    assert matrix.quantisation.bits == (4 if kind.name.startswith("Q4") else 8)
    wanted = np.empty((outputs, inputs), np.float32)
    load_library().widening(kind)(raw.ctypes.data, wanted.ctypes.data, wanted.size)
    pieces = [matrix.rows(start, start + 5 if start else 5).widened(matrix.quantisation) for start in (0, 5)]
    difference = np.abs(np.concatenate(pieces) - wanted[:10]).max()
    assert difference <= (np.abs(wanted).max() * 2**-24 if kind in OFFSETS_IN_F32 else 0)


def quantised(
    name: str, folder: Path, kind: GGMLQuantizationType, keys: Mapping[str, Any] = MappingProxyType({})
) -> tuple[GgufFiles, GgufFiles]:
    """Return a tiny model with matrices of a type, and one with the same numbers in f32. `keys`: more metadata."""
    architecture = ARCHITECTURES[name]
    architecture = replace(architecture, keys={**architecture.keys, **keys})
    plain = read_gguf(write_model(architecture, folder / "plain.gguf"))
    rounded: list[GgufData] = []
    widened: list[GgufData] = []
    for tensor in plain.tensors.values():
        values = gguf_matrix.plain_values(tensor)
        data, found = values.tobytes(), GGMLQuantizationType.F32
        if len(tensor.shape) == 2:
            blocks, found = gguf.quants.quantize(values, kind), kind
            data, values = blocks.tobytes(), gguf.quants.dequantize(blocks, kind)
        rounded.append(GgufData(tensor.name, tensor.shape, found, data))
        widened.append(GgufData(tensor.name, tensor.shape, GGMLQuantizationType.F32, values.tobytes()))
    for stem, tensors in (("rounded", rounded), ("widened", widened)):
        write_gguf(folder / f"{stem}.gguf", typed_metadata(plain), tensors)
    files = (write_package(folder / f"{stem}.gguf", folder / stem) for stem in ("rounded", "widened"))
    return next(files), next(files)


def logits_of(shards: Sequence[LlamaShard], prompt: Sequence[int]) -> Array:
    rows: Array = np.array(prompt)
    for shard in shards:
        rows = shard.run_alone(GRAPHS, rows, draws=len(prompt))
    return rows


@pytest.mark.parametrize(
    ("name", "kind"), [("llama3", Q4_0), ("mistral", Q8_0), ("qwen2", Q4_1), ("qwen3", Q8_0), ("qwen3", Q4_0)]
)
def test_graphs_calculate_the_model_but_for_the_rounding_of_activations(
    name: str, kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    files, widened = quantised(name, tmp_path, kind)
    wanted = widened.alone().logits(PROMPT, outputs=len(PROMPT))
    for cuts in ([], [2]):
        assert_near(logits_of(files.shards(cuts), PROMPT), wanted)


def assert_near(found: Array, wanted: Array) -> None:
    assert np.abs(found - wanted).mean() < 0.03 * wanted.std()
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.998


@pytest.mark.parametrize(("factor", "kind"), [(4.0, None), (4.0, "linear"), (4.0, "none"), (0.0, None)], ids=str)
def test_graphs_scale_positions_as_llamacpp_does(factor: float, kind: str | None, tmp_path: Path) -> None:
    keys = {"rope.scaling.factor": factor, **({} if kind is None else {"rope.scaling.type": kind})}
    files, widened = quantised("mistral", tmp_path, Q8_0, keys)
    assert_near(logits_of(files.shards([]), PROMPT), widened.alone().logits(PROMPT, outputs=len(PROMPT)))


async def test_smollm_in_graphs_is_as_good_as_in_llamacpp(smol: GgufFiles) -> None:
    """Its matrices have a scale and an offset for each block, and the head is of another type."""
    key = KvCompatibilityKey(GRAPHS, "fp32")
    blocks = BlockRange(0, smol.block_count)
    found = measure_quality([(blocks, smol.source(blocks))], [TEXT], [key])[key]
    assert found is not None
    assert found.mean_kl < 0.005
    assert abs(found.perplexity_change) < 0.02
    assert found.greedy_agreement > 0.95


async def test_sessions_share_steps_pages_and_the_prefix_cache_with_llamacpps(smol: GgufFiles) -> None:
    engines = [InProcess(shard) for shard in smol.shards([15])]
    for engine in engines:
        await engine.prepare(GRAPHS)
        assert engine.variants() == {LLAMACPP, GRAPHS}
    prompt, count = TEXT[:70], 8
    wanted = await decode(engines, prompt, count, variant=GRAPHS)
    assert await decode(engines, prompt, count, chunk=33, variant=GRAPHS) == wanted
    reference = await decode(engines, prompt, count, variant=LLAMACPP)
    prefix = Prefix(namespace="peer", hashes=bytes(range(32)))
    for number, (variant, expected, cached) in enumerate(
        [(GRAPHS, wanted, 0), (LLAMACPP, reference, 0), (GRAPHS, wanted, 64), (LLAMACPP, reference, 64)]
    ):
        of = session(number)
        for engine in engines:
            await engine.open(of, len(prompt) + count, prefix)
            options = SessionOptions(sampling=GREEDY if engine.info.is_last else None, variant=variant)
            assert await engine.begin(of, options) == cached
        tokens = list(memoryview((await step(engines, of, cached, prompt[cached:], 1)).data).cast("i"))
        while len(tokens) < count:
            drawn = await step(engines, of, len(prompt) + len(tokens) - 1, tokens[-1:], 1)
            tokens += memoryview(drawn.data).cast("i")
        assert tokens == expected, (number, variant)
        for engine in engines:
            await engine.close(of)
            engine.trim_now()
    graphs = [cast("LlamaShard", engine.shard)._graphs.span for engine in engines]
    assert all(each._memory[:, :, :64].any(axis=(0, 1, 3, 4)).all() for each in graphs), "of the cached prompt"
    for engine in engines:
        for _ in range(EXPIRY_ROUNDS + 1):
            engine.pages.expire()
        engine.trim_now()
    if sys.platform == "linux":  # elsewhere pages are not given back at once
        assert not any(each._memory[:, :, 32:64].any() for each in graphs)


async def test_rolled_back_rows_are_calculated_again(smol: GgufFiles) -> None:
    [shard] = smol.shards([])
    engine = InProcess(shard)
    await engine.prepare(GRAPHS)
    await start(engine, session(1), 60, variant=GRAPHS)
    first = await step([engine], session(1), 0, TEXT[:20], 1)
    await step([engine], session(1), 12, [1] * 9, 1)
    assert (await step([engine], session(1), 12, TEXT[12:20], 1)).data == first.data


async def test_worker_builds_graphs_when_they_are_asked_for_and_without_torch(tmp_path: Path) -> None:
    files, _ = quantised("qwen3", tmp_path, Q4_0)
    async with two_spans(files) as engines:
        assert not [path for path in mapped(engines[0]) if "onnx" in path]
        for engine in engines:
            await start(engine, session(1), 60, variant=LLAMACPP)
        wanted = await step(engines, session(1), 0, PROMPT, 1)
        for engine in engines:
            await engine.prepare(GRAPHS)
            paths = mapped(engine)
            assert [path for path in paths if "onnxruntime" in path]
            assert not [path for path in paths if "torch" in path]
        shards = [InProcess(shard) for shard in files.shards([2])]
        for shard in shards:
            await shard.prepare(GRAPHS)
        tokens = await decode(shards, PROMPT, 6, variant=GRAPHS)
        assert await decode(engines, PROMPT, 6, of=session(2), variant=GRAPHS) == tokens
        assert (await step(engines, session(1), 0, PROMPT, 1)).data == wanted.data


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3moe", "no graphs of the architecture qwen3moe"),
        ("gemma2", "no graphs of the architecture gemma2"),
        ("llama3", "its weights are not quantised but F32"),
    ],
)
def test_other_packages_are_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    files = write_package(write_model(ARCHITECTURES[name], tmp_path / "model.gguf"), tmp_path / "package")
    [shard] = files.shards([])
    with pytest.raises(EngineError, match=f"^onnxruntime cannot compute this package: .*{reason}$"):
        shard.prepare(GRAPHS)
    assert shard.variants() == {LLAMACPP}


def test_unknown_metadata_refuse_graphs(tmp_path: Path) -> None:
    changed = replace(ARCHITECTURES["mistral"], keys={"attn_logit_softcapping": 50.0})
    files = write_package(write_model(changed, tmp_path / "model.gguf"), tmp_path / "package")
    with pytest.raises(EngineError, match=r"graphs have no llama\.attn_logit_softcapping$"):
        files.shards([])[0].prepare(GRAPHS)


def test_graphs_have_room_beside_llamacpp_or_are_refused(tmp_path: Path) -> None:
    files, _ = quantised("qwen3", tmp_path, Q4_0)
    positions = []
    for memory_bytes, has_room in ((16 << 20, True), (3 << 20, False)):
        [shard] = files.shards([], EngineOptions(threads=1, memory_bytes=memory_bytes))
        positions.append(shard.info.kv_positions)
        if has_room:
            shard.prepare(GRAPHS)
        else:
            with pytest.raises(EngineError, match=r"onnxruntime/native takes \d+ MiB of memory, too much of the"):
                shard.prepare(GRAPHS)
    assert positions[0] > positions[1]


def test_other_variants_are_unavailable(smol: GgufFiles) -> None:
    [shard] = smol.shards([])
    with pytest.raises(EngineError, match="onnxruntime/int4 is not for GGUF packages"):
        shard.prepare(Variant("onnxruntime", "int4"))
    assert shard.variants() == {LLAMACPP}
