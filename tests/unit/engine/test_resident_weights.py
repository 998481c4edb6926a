"""What an engine holds in memory: the weights once, in the type that they were published in, and nothing idle."""

import gc
import pkgutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, cast

import pytest
import torch

from node.engine.backends.narrow import NarrowWeights
from node.engine.backends.transformers import TransformersSpan
from node.engine.interface import REFERENCE, EngineOptions, NoVariantMemory, Variant
from node.engine.loading import load_span
from node.engine.torch_shard import TorchShard
from node.engine.widened import multiply_widened
from protocol.identity import BlockRange
from tests.unit.engine.driving import DEVICE, InProcess, decode, memory_for, spans
from tests.unit.engine.tiny_models import BLOCKS, COUNT, PROMPT, TinyModel, narrowed

MakeTinyModel = Callable[[str], TinyModel]
WHOLE = BlockRange(0, BLOCKS)
OPTIONS = EngineOptions(kv_positions=512)
FUSED, GRAPHS = Variant("fused", "fp32"), Variant("onnxruntime", "fp32")


def engines_of(tiny: TinyModel, count: int, options: EngineOptions = OPTIONS) -> list[InProcess]:
    return [InProcess(TorchShard(tiny.source(blocks), blocks, options)) for blocks in spans(BLOCKS, count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen2", "qwen3", "mistral"])
async def test_narrow_weights_give_the_tokens_of_fp32(
    family: str, dtype: torch.dtype, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    tiny = narrowed(make_tiny_model(family), dtype, tmp_path)
    for count in (1, 3):
        engines = engines_of(tiny, count)
        for variant in (REFERENCE, FUSED, GRAPHS):
            for engine in engines:
                await engine.prepare(variant)
            assert await decode(engines, PROMPT, COUNT, variant=variant) == tiny.tokens, f"{variant}, {count} spans"
            assert await decode(engines, PROMPT, COUNT, variant=variant, chunk=4) == tiny.tokens


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt", "granite", "llama, gelu", "qwen3, dynamic RoPE"])
async def test_model_too_large_as_fp32_is_held_as_published(
    family: str, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    tiny = narrowed(make_tiny_model(family), torch.bfloat16, tmp_path)
    options = replace(OPTIONS, device=DEVICE)
    for count in (1, 3):
        engines = []
        for blocks in spans(BLOCKS, count):
            widened = TorchShard(tiny.source(blocks), blocks, options).info
            limited = EngineOptions(memory_bytes=memory_for(tiny.source(blocks), widened, 0), device=DEVICE)
            engines.append(InProcess(TorchShard(tiny.source(blocks), blocks, limited)))
            assert engines[-1].info.weight_bytes < 0.7 * widened.weight_bytes
        assert await decode(engines, PROMPT, COUNT) == tiny.tokens, f"{count} spans"


@pytest.mark.parametrize("family", ["gemma3", "opt"])
def test_weights_held_as_published_are_widened_where_they_lie(
    family: str, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    """On a device whose tensors have no content, so that nothing can be copied from them to the CPU."""
    tiny, device = narrowed(make_tiny_model(family), torch.bfloat16, tmp_path), torch.device("meta")
    span = load_span(tiny.source(WHOLE), WHOLE, None, device)
    weights = NarrowWeights(span)
    for number, block in enumerate(span.blocks):
        with weights.widened(number):
            assert {(each.device, each.dtype) for each in block.parameters()} == {(device, torch.float32)}
    embedding, head = span.model.get_input_embeddings(), span.model.get_output_embeddings()
    assert embedding(torch.zeros(1, 2, dtype=torch.long, device=device)).device == device
    assert head(torch.zeros(1, 2, head.weight.shape[1], device=device)).device == device


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_widened_product_is_that_of_fp32(threads: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(outputs, 1000, generator=generator).bfloat16() for outputs in (700, 1, 333)]
    given = torch.randn(rows, 1000, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product = multiply_widened(given, matrices)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(product, given @ torch.cat(matrices).float().t(), rtol=1e-5, atol=1e-4)


def held_bytes(before: set[int], shard: TorchShard) -> int:
    """Return the bytes of all tensors made since, but for KV memory and views of mapped files."""
    mapped = {weight.untyped_storage().data_ptr() for weight in shard._span.model.parameters() if weight.dim() > 1}
    cache = {part.untyped_storage().data_ptr() for block in shard._kv.blocks for part in (block.keys, block.values)}
    made = {where: size for where, size in storages().items() if where not in before | mapped | cache}
    return sum(made.values())


def storages() -> dict[int, int]:
    gc.collect()
    found = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not each.is_meta)
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}


@pytest.mark.parametrize(
    ("dtype", "variant", "bytes_per_element"),
    [
        (torch.bfloat16, FUSED, 0.0),  # the pages of the file, and no copy
        (torch.bfloat16, Variant("fused", "bf16"), 0.0),
        (torch.bfloat16, Variant("fused", "int8"), 1.0),
        (torch.float32, FUSED, 4.0),
    ],
    ids=str,
)
def test_variant_is_held_once(
    dtype: torch.dtype, variant: Variant, bytes_per_element: float, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    tiny = narrowed(make_tiny_model("llama"), dtype, tmp_path)
    before = set(storages())
    shard = TorchShard(tiny.source(WHOLE), WHOLE, OPTIONS)
    elements = sum(weight.numel() for weight in shard._span.blocks.parameters() if weight.dim() > 1) + 97 * 32
    shard.prepare(variant)
    small = 24 << 10  # norms, scales and rotary tables
    assert elements * bytes_per_element <= held_bytes(before, shard) <= elements * bytes_per_element + small


def mapped_rss_bytes(folder: Path, files: str = "*") -> int:
    """Return how much memory this process has of files in a folder."""
    paths = {str(path) for path in folder.glob(f"{files}.safetensors")}
    total, is_theirs = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == "Rss":
            total += 1024 * int(value.split()[0]) if is_theirs else 0
        elif "-" in field.split(" ")[0]:
            is_theirs = line.split()[-1] in paths
    return total


async def test_reference_is_loaded_again_after_it_could_not_be(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama")
    (engine,) = engines_of(tiny, 1)
    shard = cast("TorchShard", engine.shard)
    monkeypatch.setattr(shard._reference, "_mapped", None)  # it takes memory of its own, as on a GPU
    monkeypatch.setattr(shard, "_packed_bytes", shard._reference.needed_bytes)

    def fail(_: TransformersSpan) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersSpan, "trial_run", fail)
        with pytest.raises(NoVariantMemory, match="takes more memory"):
            engine.shard.prepare(REFERENCE)
    engine.shard.prepare(REFERENCE)
    assert await decode([engine], PROMPT, COUNT) == tiny.tokens


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is resident")
async def test_idle_reference_gives_its_memory_back(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    tiny = narrowed(make_tiny_model("llama"), torch.float32, tmp_path)
    (engine,) = engines_of(tiny, 1)
    await engine.prepare(FUSED)
    assert mapped_rss_bytes(tmp_path, "[0-9]") == 0, "what was packed stays in memory as published, too"
    for _ in range(2):
        await engine.prepare(REFERENCE)
        assert await decode([engine], PROMPT, COUNT) == tiny.tokens
        assert mapped_rss_bytes(tmp_path) >= engine.info.weight_bytes
        engine.shard.unload_reference()
        assert mapped_rss_bytes(tmp_path) == 0
        assert REFERENCE in engine.variants()
        assert await decode([engine], PROMPT, COUNT, variant=FUSED) == tiny.tokens
    assert await decode([engine], PROMPT, COUNT) == tiny.tokens


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is resident")
@pytest.mark.parametrize(("variant", "is_served"), [(FUSED, True), (Variant("fused", "int8"), False), (GRAPHS, False)])
async def test_published_pages_outlast_the_reference_only_where_they_serve(
    variant: Variant, is_served: bool, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    tiny = narrowed(make_tiny_model("llama"), torch.bfloat16, tmp_path)
    (engine,) = engines_of(tiny, 1)
    for each in (variant, REFERENCE):
        await engine.prepare(each)
    await decode([engine], PROMPT, 2)
    engine.shard.unload_reference()
    assert (mapped_rss_bytes(tmp_path) > 0) == is_served


@pytest.mark.parametrize(
    ("variant", "reader"),
    [
        *((Variant("fused", each), "node.engine.backends.torch.pack") for each in ("fp32", "bf16", "int8")),
        (GRAPHS, "node.engine.backends.onnx._floats"),
    ],
    ids=str,
)
async def test_variant_built_while_the_reference_runs_has_the_published_weights(
    variant: Variant, reader: str, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = narrowed(make_tiny_model("llama"), torch.bfloat16, tmp_path)
    quiet, engine = (*engines_of(tiny, 1), *engines_of(tiny, 1))
    await quiet.prepare(variant)
    wanted = await decode([quiet], PROMPT, COUNT, variant=variant)

    widened, read = NarrowWeights.widened, pkgutil.resolve_name(reader)
    has_matrix, has_passed = threading.Event(), threading.Event()
    builder = threading.Thread(target=engine.shard.prepare, args=[variant])

    def read_later(packing_or_values: str | torch.Tensor, *rest: object) -> object:
        """Read a matrix that was looked up while the reference ran the first block when it has run the last one."""
        if isinstance(packing_or_values, str) or packing_or_values.dim() == 2:
            has_matrix.set()
            assert has_passed.wait(60)
        return read(packing_or_values, *rest)

    @contextmanager
    def building_meanwhile(weights: NarrowWeights, number: int) -> Iterator[None]:
        with widened(weights, number):
            if number == 0:
                builder.start()
                assert has_matrix.wait(60)
            if number == BLOCKS - 1:
                has_passed.set()
                builder.join()
            yield

    with monkeypatch.context() as patch:
        patch.setattr(reader, read_later)
        patch.setattr(NarrowWeights, "widened", building_meanwhile)
        await engine.prepare(REFERENCE)
    assert await decode([engine], PROMPT, COUNT) == tiny.tokens
    assert await decode([engine], PROMPT, COUNT, variant=variant) == wanted


async def test_variants_are_built_without_the_reference(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("qwen3")

    def fail(*_arguments: object) -> None:
        raise AssertionError("the reference runs")

    monkeypatch.setattr(TransformersSpan, "_forward", fail)
    engines = engines_of(tiny, 2)
    for variant in (FUSED, GRAPHS):
        for engine in engines:
            await engine.prepare(variant)
        assert await decode(engines, PROMPT, COUNT, variant=variant) == tiny.tokens
