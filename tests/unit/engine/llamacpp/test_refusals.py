"""What cannot be served is one clear line: damaged files, too little memory, unknown architectures, another library."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.engine.interface import EngineError, EngineOptions, SessionOptions, SliceInput, StepFailed, VariantNotReady
from node.engine.kv_allocator import KvReservation
from node.engine.llamacpp import context, granularity, library, span_file
from node.engine.llamacpp import shard as shard_module
from node.engine.llamacpp.context import SequenceRows, cells_for
from node.engine.llamacpp.kv_memory import PassFailed
from node.engine.llamacpp.shard import LLAMACPP, LlamaShard
from node.engine.memory_plan import GGUF_COSTS, ModelSizes, memory_plan
from protocol.identity import BlockRange
from protocol.tensors import DType, Tensor, tensor_from_tokens
from selector.cuts import Cuts
from tests.unit.engine.driving import GREEDY, InProcess, decode, session
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, write_model
from tests.unit.engine.llamacpp.packages import GgufFiles, write_package

WHOLE = BlockRange(0, 4)


@pytest.fixture
def files(tmp_path: Path) -> GgufFiles:
    return write_package(write_model(ARCHITECTURES["llama3"], tmp_path / "model.gguf"), tmp_path / "package")


def refusal(files: GgufFiles, blocks: BlockRange = WHOLE, **options: Any) -> str:
    with pytest.raises(EngineError) as caught:
        LlamaShard(files.source(blocks), blocks, EngineOptions(threads=1, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_little_memory_says_how_much_is_missing(files: GgufFiles) -> None:
    shard = LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=32))
    plan = memory_plan(ModelSizes.of_source(files.source(WHOLE), Cuts(4)), WHOLE, GGUF_COSTS)
    needed = shard.info.weight_bytes + plan.reserve_bytes + cells_for(32) * shard.info.kv_bytes_per_position
    assert "blocks 0-4 need 1 MiB of memory more" in refusal(files, memory_bytes=needed - 100)
    LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, memory_bytes=needed))


def test_kv_memory_is_what_its_positions_take(files: GgufFiles) -> None:
    shard = LlamaShard(files.source(BlockRange(1, 3)), BlockRange(1, 3), EngineOptions(threads=1, kv_positions=32))
    assert shard.info.kv_bytes_per_position == 2 * 2 * (2 * 16) * 2  # blocks, keys and values, heads, f16


def test_file_cut_short_is_named(files: GgufFiles) -> None:
    source = files.source(WHOLE)
    path = source.block_files[2]
    os.truncate(path, path.stat().st_size - 500)
    assert f"{path.name} is cut short" in refusal(files)


@pytest.mark.parametrize("spoil", [os.truncate, lambda path, _size: path.write_bytes(bytes(1 << 20))])
async def test_damaged_span_file_is_built_again(
    files: GgufFiles, tmp_path: Path, spoil: Callable[[Path, int], object]
) -> None:
    options = EngineOptions(threads=1, kv_positions=256, cache_dir=tmp_path / "cache")
    wanted = await decode([InProcess(LlamaShard(files.source(WHOLE), WHOLE, options))], [1, 2, 3], 4, variant=LLAMACPP)
    [path] = (tmp_path / "cache").glob("*/span.gguf")
    spoil(path, 5000)
    again = InProcess(LlamaShard(files.source(WHOLE), WHOLE, options))
    assert await decode([again], [1, 2, 3], 4, variant=LLAMACPP) == wanted


def test_span_file_of_another_format_is_not_used(
    files: GgufFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(threads=1, kv_positions=256, cache_dir=tmp_path)
    LlamaShard(files.source(WHOLE), WHOLE, options)
    monkeypatch.setattr(span_file, "FORMAT", span_file.FORMAT + 1)
    LlamaShard(files.source(WHOLE), WHOLE, options)
    assert len(list(tmp_path.glob("*/span.gguf"))) == 2


def test_span_that_llama_cpp_refuses_is_built_once(
    files: GgufFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def build(path: Path, *_: object) -> None:
        built.append(path)
        path.write_bytes(b"GGUF")

    monkeypatch.setattr(span_file, "write_span", build)
    assert "llama.cpp cannot load the model" in refusal(files, cache_dir=tmp_path)
    assert len(built) == 1


def test_disk_without_room_for_the_span_file_is_named(
    files: GgufFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0))
    line = refusal(files, cache_dir=tmp_path / "cache")
    assert line.startswith(f"the file of blocks 0-4 needs 1 MiB of disk in {tmp_path}/cache, where 0 MiB are free: ")
    assert not list((tmp_path / "cache").iterdir())


def test_unused_folders_of_the_cache_make_room_for_the_span_file(
    files: GgufFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "cache" / "of an earlier version"
    old.mkdir(parents=True)
    (old / "span.gguf").write_bytes(bytes(2 << 20))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0) if old.exists() else usage)
    LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=256, cache_dir=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("*/span.gguf"))) == 1


def test_sound_span_file_is_not_built_again(files: GgufFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=256, cache_dir=tmp_path))

    def fail(*_: object) -> None:
        raise EngineError("no memory")

    monkeypatch.setattr(shard_module, "SpanModel", fail)
    monkeypatch.setattr(span_file, "write_span", pytest.fail)
    assert refusal(files, cache_dir=tmp_path) == "no memory"


def test_missing_block_is_named(files: GgufFiles) -> None:
    source = files.source(WHOLE)
    fewer = {block: path for block, path in source.block_files.items() if block != 2}
    with pytest.raises(EngineError, match="no tensors of block 2"):
        LlamaShard(replace(source, block_files=fewer), WHOLE, EngineOptions(threads=1))


def test_unknown_architecture_is_named_at_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unheard_of = replace(ARCHITECTURES["llama3"], name="unheardof")
    path = write_model(unheard_of, tmp_path / "model.gguf")
    assert granularity.main([str(path)]) == 1
    assert "llama.cpp cannot load the model: unknown model architecture: 'unheardof'" in capsys.readouterr().out


def test_bad_rows_cost_their_session_alone(files: GgufFiles) -> None:
    engine = InProcess(LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=256)))
    options = SessionOptions(sampling=GREEDY, variant=LLAMACPP)
    for number in range(3):
        engine.open_now(session(number), 32, options)
    given = [driven(number, [1, 2, 200 if number == 1 else 3]) for number in range(3)]
    result = engine.step_now(given)
    assert [fault.session for fault in result.faults] == [session(1)]
    assert result.faults[0].by_rows
    assert [output.session for output in result.outputs] == [session(0), session(2)]


def test_rows_that_make_a_pass_fail_cost_their_session_alone(files: GgufFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=256))
    engine = InProcess(shard)
    for number in range(4):
        engine.open_now(session(number), 32, SessionOptions(sampling=GREEDY, variant=LLAMACPP))
    context = shard._kv[LLAMACPP].context
    run = context.run

    def fails_on_seven(parts: list[SequenceRows], block_count: int, **options: bool) -> Any:
        if any(7 in part.rows for part in parts):
            raise PassFailed("llama.cpp could not compute 3 rows (error 1)")
        return run(parts, block_count, **options)

    monkeypatch.setattr(context, "run", fails_on_seven)
    result = engine.step_now([driven(number, [1, 2, 7 if number == 2 else 3]) for number in range(4)])
    assert [fault.session for fault in result.faults] == [session(2)]
    assert not result.faults[0].by_rows
    assert len(result.outputs) == 3
    with pytest.raises(StepFailed, match="is not open"):
        engine.step_now([driven(2, [1])])


def test_kv_memory_that_cannot_grow_costs_only_who_needs_more(
    files: GgufFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "FIRST_POSITIONS", 256)
    shard = LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=1024))
    engine = InProcess(shard)
    for number in range(3):
        engine.open_now(session(number), 256, SessionOptions(sampling=GREEDY, variant=LLAMACPP))
    tokens = [1, 2, 3, 4] * 50
    engine.step_now([driven(number, tokens) for number in range(2)])
    functions, held = library.load_library(), shard._kv[LLAMACPP].context.positions
    init = functions.llama_init_from_model
    monkeypatch.setattr(
        functions, "llama_init_from_model", lambda *given: None if given[1].n_ctx > held else init(*given)
    )
    result = engine.step_now([replace(driven(0, [1]), position=200), driven(2, tokens)])
    assert [fault.session for fault in result.faults] == [session(2)]
    assert "too little memory for 1024 positions" in result.faults[0].message
    assert [output.session for output in result.outputs] == [session(0)]


def test_session_whose_cached_pages_are_gone_fails_alone(files: GgufFiles) -> None:
    shard = LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=256))
    options = SessionOptions(sampling=GREEDY, variant=LLAMACPP)
    shard.begin(session(1), options, KvReservation(positions=64, pages=(0, 1), copied=(5,)))
    shard.begin(session(2), options, KvReservation(positions=64, pages=(2, 3)))
    result = shard.step([driven(number, [1, 2]) for number in (1, 2)])
    assert [fault.session for fault in result.faults] == [session(1)]
    assert [output.session for output in result.outputs] == [session(2)]


def test_states_that_are_not_finite_are_the_senders_fault(files: GgufFiles) -> None:
    blocks = BlockRange(2, 4)
    engine = InProcess(LlamaShard(files.source(blocks), blocks, EngineOptions(threads=1, kv_positions=256)))
    engine.open_now(session(1), 32, SessionOptions(sampling=GREEDY, variant=LLAMACPP))
    states = np.full((1, 64), np.nan, np.float32)
    with pytest.raises(StepFailed):
        engine.step_now([replace(driven(1, [1]), tensor=Tensor(DType.FLOAT32, states.shape, states.tobytes()))])


def test_a_part_that_begins_within_the_span_is_refused(files: GgufFiles) -> None:
    engine = InProcess(LlamaShard(files.source(WHOLE), WHOLE, EngineOptions(threads=1, kv_positions=256)))
    with pytest.raises(VariantNotReady, match="does not run blocks 1-2 of its span alone"):
        engine.open_now(session(1), 32, SessionOptions(variant=LLAMACPP, blocks=BlockRange(1, 2)))


def test_library_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.load_library()
    monkeypatch.setattr(library, "CONTEXT_DEFAULTS", {**library.CONTEXT_DEFAULTS, "n_ubatch": 1024})
    with pytest.raises(EngineError, match=r"ContextParameters.n_ubatch is 512, not 1024.*pip install"):
        found.check()


def test_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", "2027.1.1")
    with pytest.raises(EngineError, match=r"is installed, and this engine is written for 2027\.1\.1"):
        library.load_library.__wrapped__()
    monkeypatch.setattr(library, "WHEEL", "xllamacpp_missing")
    with pytest.raises(EngineError, match=r"need the wheel xllamacpp_missing, which is not installed"):
        library.load_library.__wrapped__()


def test_lacking_system_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_library(_path: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("ctypes.CDLL", open_library)
    with pytest.raises(EngineError, match=r"needs libgomp\.so\.1 .*apt-get install libgomp1"):
        library.Library(tmp_path / "library.so")


def test_damaged_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.so").write_bytes(b"\x7fELF")
    with pytest.raises(EngineError, match=r"damaged .*pip install"):
        library.Library(tmp_path / "xllamacpp.so")


def test_library_that_was_cut_short_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is that of the wheel's record, as its loader may end the process by a signal."""
    package, about = tmp_path / library.WHEEL, tmp_path / f"{library.WHEEL}-{library.VERSION}.dist-info"
    for folder in (package, about):
        folder.mkdir()
    (package / "__init__.py").touch()
    (package / "xllamacpp.so").write_bytes(b"\x7fELF")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library.WHEEL}\nVersion: {library.VERSION}\n")
    (about / "RECORD").write_text(f"{library.WHEEL}/xllamacpp.so,sha256=x,1000\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"is damaged \(xllamacpp.so has 4 bytes, not 1000\): .*pip install"):
        library.load_library.__wrapped__()


def driven(number: int, tokens: list[int]) -> SliceInput:
    return SliceInput(session(number), 0, tensor_from_tokens(tokens), 1)
