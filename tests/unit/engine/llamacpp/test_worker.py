"""The worker of a GGUF span: what it imports, that it serves as any other, and what its death costs."""

import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
from gguf.constants import GGMLQuantizationType

from node.engine import base, client
from node.engine.base import Engine
from node.engine.client import start_worker
from node.engine.interface import (
    EngineCrashed,
    EngineError,
    EngineOptions,
    SessionOptions,
    SliceInput,
    StepFailed,
    Variant,
    VariantNotReady,
)
from node.engine.llamacpp.graph_variant import GRAPHS
from node.engine.llamacpp.shard import LLAMACPP
from node.engine.worker_process import SpareWorker
from node.models.layout import GGUF, SAFETENSORS
from protocol.identity import BlockRange
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import GREEDY, decode, session, start, step
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, write_model
from tests.unit.engine.llamacpp.packages import GgufFiles, write_package
from tests.unit.engine.test_worker import break_library

MIB = 1 << 20
OPTIONS = EngineOptions(threads=1, kv_positions=256)
PROMPT = [3, 141, 59, 26, 53, 58, 97]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> GgufFiles:
    folder = tmp_path_factory.mktemp("qwen3")
    return write_package(write_model(ARCHITECTURES["qwen3"], folder / "model.gguf"), folder / "package")


@asynccontextmanager
async def two_spans(files: GgufFiles, options: EngineOptions = OPTIONS) -> AsyncIterator[list[Engine]]:
    first, last = BlockRange(0, 2), BlockRange(2, 4)
    async with (
        start_worker(files.source(first), first, options) as one,
        start_worker(files.source(last), last, options) as other,
    ):
        yield [one, other]


def mapped(engine: Engine) -> list[str]:
    """Return the files that the engine's worker has mapped."""
    pid = engine.statistics().worker_pid
    assert pid is not None
    return [region.path for region in psutil.Process(pid).memory_maps()]


async def test_workers_serve_without_torch_and_transformers(files: GgufFiles) -> None:
    async with two_spans(files) as engines:
        assert await decode(engines, PROMPT, 10, variant=LLAMACPP) == files.alone().decode(PROMPT, 10)
        assert engines[0].variants() == {LLAMACPP}
        for engine in engines:
            paths = mapped(engine)
            assert any("xllamacpp" in path for path in paths)
            assert not [path for path in paths if "torch" in path or "tokenizers" in path or "onnx" in path]


async def test_other_variants_are_refused_in_one_line(files: GgufFiles) -> None:
    async with two_spans(files) as engines:
        with pytest.raises(EngineError, match="eager/fp32 is not for GGUF packages"):
            await engines[0].prepare(Variant("eager", "fp32"))
        assert await decode(engines, PROMPT, 2, variant=LLAMACPP)


@pytest.mark.parametrize("library", ["onnxruntime", "onnx"])
async def test_library_that_cannot_be_imported_costs_its_variant_alone(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(ARCHITECTURES["qwen3"], tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    files = write_package(model, tmp_path / "package")
    blocks = BlockRange(0, 4)
    break_library(library, tmp_path, monkeypatch)
    options = replace(OPTIONS, kv_positions=4096, memory_bytes=1 << 30)
    async with start_worker(files.source(blocks), blocks, options) as engine:
        await start(engine, session(1), 40, variant=LLAMACPP)
        with pytest.raises(EngineError, match=rf"^{library} cannot be imported: .* refused$") as why:
            await engine.prepare(GRAPHS)
        assert not isinstance(why.value, EngineCrashed)
        drawn = await step([engine], session(1), 0, PROMPT, 1)
        assert tokens_from_tensor(drawn) == files.alone().decode(PROMPT, 1)


def written_bytes(engine: Engine) -> int:
    pid = engine.statistics().worker_pid
    assert pid is not None
    return psutil.Process(pid).memory_full_info().uss


async def test_worker_without_sessions_gives_back_what_they_had_taken(
    smol: GgufFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "UNLOAD_ROUND_S", 0.01)
    monkeypatch.setattr(client, "UNLOAD_AFTER_S", 0.0)
    blocks = BlockRange(0, 10)
    async with start_worker(smol.source(blocks), blocks, EngineOptions(threads=1, kv_positions=8192)) as engine:
        await start(engine, session(1), 2200, variant=LLAMACPP)
        await step([engine], session(1), 0, [7] * 8, 0)
        before = written_bytes(engine)
        await step([engine], session(1), 8, [7] * 2100, 0)
        assert written_bytes(engine) > before + 18 * MIB
        await engine.close(session(1))
        with trio.fail_after(30):
            while written_bytes(engine) > before + 9 * MIB:
                await trio.sleep(0.05)


async def test_worker_gives_back_beside_a_session_what_others_had_taken(
    smol: GgufFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "UNLOAD_ROUND_S", 0.01)
    monkeypatch.setattr(client, "UNLOAD_AFTER_S", 0.05)
    blocks, others = BlockRange(0, 5), range(2, 10)
    async with start_worker(smol.source(blocks), blocks, EngineOptions(threads=1, kv_positions=8192)) as engine:
        await start(engine, session(1), 200, variant=LLAMACPP)
        await step([engine], session(1), 0, [7] * 8, 0)
        before = written_bytes(engine)
        for number in others:
            await start(engine, session(number), 520, variant=LLAMACPP)
            await step([engine], session(number), 0, [7] * 520, 0)
        assert written_bytes(engine) > before + 15 * MIB
        for number in others:
            await engine.close(session(number))
        with trio.fail_after(30):
            for position in itertools.count(8):
                await step([engine], session(1), position, [7], 0)
                if written_bytes(engine) < before + 8 * MIB:
                    break


async def test_renamed_session_goes_on(files: GgufFiles) -> None:
    wanted = files.alone().decode(PROMPT, 4)
    async with two_spans(files) as engines:
        for engine in engines:
            await start(engine, session(1), 40, variant=LLAMACPP)
        await step(engines, session(1), 0, PROMPT, 1)
        for engine in engines:
            await engine.rename(session(1), session(2))
        again = await step(engines, session(2), len(PROMPT), wanted[:3], 1)
        assert list(memoryview(again.data).cast("i")) == wanted[3:]
        await engines[0].close(session(2))
        with pytest.raises(EngineError, match="is not open"):
            await engines[0].step([SliceInput(session(2), 0, tensor_from_tokens([1]), 0)])


async def test_session_that_cannot_begin_costs_no_other(files: GgufFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockRange(0, 4)
    later = SessionOptions(variant=LLAMACPP, blocks=BlockRange(2, 4), sampling=GREEDY)
    wanted = files.alone().decode(PROMPT, 1)
    async with start_worker(files.source(blocks), blocks, OPTIONS) as engine:
        await start(engine, session(1), 40, variant=LLAMACPP)
        await engine.open(session(2), 40)
        with pytest.raises(VariantNotReady, match="llamacpp/native does not run blocks 2-4 of its span alone"):
            await engine.begin(session(2), later)
        monkeypatch.setattr(base, "session_part", lambda info, _ready, _options: info)  # only the worker notices
        await engine.open(session(2), 40)
        await engine.begin(session(2), later)
        with pytest.raises(StepFailed, match="is not open, or has not begun"):
            await engine.step([SliceInput(session(2), 0, tensor_from_tokens([1]), 1)])
        assert tokens_from_tensor(await step([engine], session(1), 0, PROMPT, 1)) == wanted


async def test_death_of_a_worker_ends_its_sessions_and_a_new_one_goes_on(files: GgufFiles) -> None:
    blocks = BlockRange(0, 2)
    async with start_worker(files.source(blocks), blocks, OPTIONS) as engine:
        await start(engine, session(1), 40, variant=LLAMACPP)
        pid = engine.statistics().worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(10):
            await engine.wait_crashed()
        with pytest.raises(EngineCrashed):
            await engine.step([SliceInput(session(1), 0, tensor_from_tokens(PROMPT), 0)])
    async with two_spans(files) as engines:
        assert await decode(engines, PROMPT, 4, variant=LLAMACPP) == files.alone().decode(PROMPT, 4)


async def test_daemons_with_one_cache_map_one_file(files: GgufFiles, tmp_path: Path) -> None:
    options = EngineOptions(threads=1, kv_positions=256, cache_dir=tmp_path)
    async with two_spans(files, options) as engines, two_spans(files, options) as others:
        for one, other in zip(engines, others, strict=True):
            [path] = {path for path in mapped(one) if path.endswith("span.gguf")}
            assert path in mapped(other)
            assert Path(path).is_relative_to(tmp_path)


async def test_spare_worker_is_for_the_format_that_is_expected(files: GgufFiles) -> None:
    for expected, is_taken in ((GGUF, True), (SAFETENSORS, False)):
        spare = SpareWorker(OPTIONS)
        async with trio.open_nursery() as nursery:
            await nursery.start(spare.run)
            spare.expect(expected)
            before = {child.pid for child in psutil.Process().children()}
            blocks = BlockRange(0, 2)
            async with start_worker(files.source(blocks), blocks, OPTIONS, spare=spare) as engine:
                assert (engine.statistics().worker_pid in before) == is_taken
            nursery.cancel_scope.cancel()
