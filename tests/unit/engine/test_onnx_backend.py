"""Graphs are built once, used again, built anew where they are damaged; and the disk they take is bounded."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from node.engine.backends import onnx
from node.engine.interface import EngineOptions, SessionOptions, SliceInput, Variant
from node.engine.torch_shard import TorchShard
from node.util.disk_cache import FolderCache, folder_bytes
from protocol.identity import BlockRange
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import GREEDY, InProcess, decode, session
from tests.unit.engine.tiny_models import BLOCKS, COUNT, PROMPT, TinyModel, changed

MakeTinyModel = Callable[[str], TinyModel]
GRAPHS, INT4 = Variant("onnxruntime", "fp32"), Variant("onnxruntime", "int4")
WHOLE = BlockRange(0, BLOCKS)


def engine_of(tiny: TinyModel, cache_dir: Path, variant: Variant = GRAPHS) -> InProcess:
    shard = TorchShard(tiny.source(WHOLE), WHOLE, EngineOptions(kv_positions=512, cache_dir=cache_dir))
    shard.prepare(variant)
    return InProcess(shard)


async def test_onnx_graphs_are_cached_for_the_next_worker(
    make_tiny_model: MakeTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama")
    engine_of(tiny, tmp_path)
    monkeypatch.delattr(onnx, "write_graphs")  # building them again would fail
    assert await decode([engine_of(tiny, tmp_path)], PROMPT, COUNT, variant=GRAPHS) == tiny.tokens


@pytest.mark.parametrize("spoiled", ["2.onnx", "2.constants"])
async def test_damaged_onnx_graphs_are_rebuilt(spoiled: str, make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    tiny = make_tiny_model("llama")
    engine_of(tiny, tmp_path)
    cut_short(tmp_path, spoiled)
    assert await decode([engine_of(tiny, tmp_path)], PROMPT, COUNT, variant=GRAPHS) == tiny.tokens


def on_grid(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix that four bits hold without a loss."""
    if matrix.dim() < 2 or "embed" in name:
        return matrix
    how = onnx.QUANTISATIONS["int4"]
    return torch.from_numpy(onnx.rounded(matrix, how).widened(how))[:, : matrix.shape[1]].contiguous()


async def test_four_bits_give_the_tokens_of_weights_that_they_hold_exactly(
    make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    tiny = changed(make_tiny_model("qwen3"), on_grid, tmp_path)
    text = PROMPT + tiny.tokens
    engine = engine_of(tiny, tmp_path / "graphs", INT4)
    engine.open_now(session(1), 60, SessionOptions(sampling=GREEDY, variant=INT4))
    rows = SliceInput(session=session(1), position=0, tensor=tensor_from_tokens(text[:-1]), draws=COUNT)
    drawn = tokens_from_tensor(engine.step_now([rows]).outputs[0].tensor)
    # Activations are rounded to int8, so that a close call may end otherwise.
    assert sum(one == other for one, other in zip(drawn, tiny.tokens, strict=True)) >= COUNT - 2


def cut_short(cache_dir: Path, name: str) -> None:
    (folder,) = cache_dir.iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:100])


def fill(size: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "file").write_bytes(bytes(size))

    return build


USE = """
import sys
from pathlib import Path
from node.util.disk_cache import FolderCache
print(FolderCache(Path(sys.argv[1])).folder(sys.argv[2], lambda folder: None), flush=True)
sys.stdin.read()
"""
"""Of another process, which uses a folder until its input ends."""


def leave(directory: Path, *names: str) -> None:
    """Leave folders of a process that has ended; the first was used last."""
    for age_s, name in enumerate(names):
        (directory / name).mkdir()
        fill(100)(directory / name)
        os.utime(directory / name, times=(1e9 - age_s, 1e9 - age_s))


def test_disk_cache_evicts_least_recently_used_folder(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, limit_bytes=250)
    leave(tmp_path, "a", "b")
    cache.folder("c", fill(100))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}
    cache.folder("larger than all", fill(400))
    assert {path.name for path in tmp_path.iterdir()} == {"c", "larger than all"}, "c is in use"


def test_other_users_may_read_folders_of_the_disk_cache(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = FolderCache(tmp_path).folder("a", fill(1))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_disk_cache_makes_room_without_folders_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, cache = shutil.disk_usage(tmp_path), FolderCache(tmp_path)

    def full_disk(_path: Path) -> object:
        return usage._replace(total=500, free=500 - folder_bytes(tmp_path))

    leave(tmp_path, "a", "b", "c", "d")
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    with subprocess.Popen(
        [sys.executable, "-c", USE, str(tmp_path), "c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        os.utime(tmp_path / "c", times=(1e8, 1e8))  # used first, and still
        cache.make_room(200)
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
        cache.make_room(450)
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}, "to delete all but c would not do"
        cache.make_room(400)
        assert {path.name for path in tmp_path.iterdir()} == {"c"}
        other.communicate()
    cache.make_room(450)
    assert not list(tmp_path.iterdir())


def test_disk_cache_evicts_abandoned_builds_but_not_running_ones(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path)
    for name in (".building-abandoned", ".building-now"):
        (tmp_path / name).mkdir()
        fill(100)(tmp_path / name)
    os.utime(tmp_path / ".building-abandoned", times=(1e9, 1e9))
    cache.folder("a", fill(100))
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".building-now"}


def test_build_that_takes_long_is_not_abandoned(tmp_path: Path) -> None:
    """As a clock that is set makes it look, while another span is loaded."""

    def build(folder: Path) -> None:
        fill(100)(folder)
        os.utime(folder, times=(1e9, 1e9))
        FolderCache(tmp_path).folder("other", fill(1))

    assert folder_bytes(FolderCache(tmp_path).folder("a", build)) == 100


def test_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(handle: int) -> None:
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    FolderCache(tmp_path / "cache").folder("a", fill(100))
    assert [each if not each.startswith(".building") else "folder" for each in events] == [
        "file", "folder", "rename", "cache",
    ]  # fmt: skip


def test_failed_build_leaves_nothing_in_the_disk_cache(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(100)(folder)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        FolderCache(tmp_path).folder("a", fail)
    assert list(tmp_path.iterdir()) == []
