"""A text gives the same logits whatever else KV memory holds and has held, and with any number of threads."""

import errno
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from node.engine.interface import EngineLost
from node.engine.llamacpp import context
from node.engine.llamacpp.context import ContextOptions, Floats, SequenceRows, SpanContext
from node.engine.llamacpp.kv_memory import PassFailed
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.span_model import SpanModel
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, VOCABULARY, write_model

POSITIONS = 2048

Tokens = npt.NDArray[np.int32]


@pytest.fixture(scope="module", params=["llama3", "gemma2", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    """Full attention; a sliding window in every second block, and in five of six."""
    path = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    write_model(ARCHITECTURES[request.param], path, GGMLQuantizationType.Q8_0)
    return SpanModel(load_library(), path)


def opened(model: SpanModel, **options: Any) -> SpanContext:
    defaults = ContextOptions(first=True, last=True, block_count=1, positions=POSITIONS, sequences=4, threads=1)
    return SpanContext(model, replace(defaults, **options))


def text(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)


def run(memory: SpanContext, sequence: int, tokens: Tokens, start: int, end: int) -> Floats:
    """Take a part of a text; return the logits after its last token."""
    return memory.run([SequenceRows(sequence, start, tokens[start:end], 1)])[0]


@pytest.fixture(scope="module")
def wanted(model: SpanModel) -> Floats:
    return run(opened(model), 0, text(600), 0, 600)


def test_a_text_beside_others_that_end_and_are_rolled_back(model: SpanModel, wanted: Floats) -> None:
    memory, tokens = opened(model), text(600)
    run(memory, 1, text(90, seed=1), 0, 90)
    run(memory, 0, tokens, 0, 200)
    run(memory, 2, text(90, seed=2), 0, 90)
    memory.truncate(1, 0)
    for start in range(200, 590, 30):
        run(memory, 2, text(200, seed=2), 50, 80)
        memory.run([SequenceRows(0, start, text(30, seed=start), 1)])
        run(memory, 0, tokens, start, start + 30)
    assert (run(memory, 0, tokens, 590, 600) == wanted).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_single_row_and_rows_beside_it_with_any_number_of_threads(
    model: SpanModel, wanted: Floats, threads: int
) -> None:
    memory, tokens = opened(model, threads=threads), text(600)
    run(memory, 0, tokens, 0, 599)
    assert (run(memory, 0, tokens, 599, 600) == wanted).all()
    assert (run(memory, 0, tokens, 595, 600) == wanted).all()
    run(memory, 1, text(40), 0, 40)
    assert (run(memory, 0, tokens, 599, 600) == wanted).all()


def test_memory_that_ended_sequences_had_needed_is_given_back(model: SpanModel, wanted: Floats) -> None:
    memory, tokens = opened(model, first_positions=256), text(600)
    first = memory.positions
    run(memory, 1, tokens, 0, 600)
    run(memory, 0, tokens, 0, 100)
    run(memory, 2, tokens, 0, 600)
    assert memory.positions > 2 * first
    memory.shrink(idle=True)
    assert memory.positions > 2 * first, "sequences are there"
    memory.truncate(1, 0)
    memory.truncate(2, 0)
    memory.shrink(idle=True)
    assert memory.positions <= first
    assert (run(memory, 0, tokens, 100, 600) == wanted).all()


def test_memory_that_a_busy_moment_had_needed_is_given_back_beside_a_session(model: SpanModel, wanted: Floats) -> None:
    memory, tokens = opened(model, first_positions=64), text(600)
    first = memory.positions
    run(memory, 0, tokens, 0, 50)
    for sequence in range(1, 4):
        run(memory, sequence, tokens, 0, 600)
    for sequence in range(1, 4):
        memory.truncate(sequence, 0)
    taken = memory.positions
    assert taken >= 8 * first
    memory.shrink(idle=False)
    assert memory.positions == taken, "it was needed since the last time"
    memory.shrink(idle=False)
    assert memory.positions == first
    assert (run(memory, 0, tokens, 50, 600) == wanted).all()


def test_memory_is_given_back_only_as_far_as_sessions_that_have_just_begun_leave_it(
    model: SpanModel, wanted: Floats
) -> None:
    """A session holds what it shares with a cached prompt before its first rows come."""
    memory, tokens = opened(model, first_positions=64, sequences=8, positions=2 * POSITIONS), text(600)
    run(memory, 0, tokens, 0, 200)
    for sequence in range(1, 4):
        run(memory, sequence, tokens, 0, 600)
    for sequence in range(1, 4):
        memory.truncate(sequence, 0)
    memory.shrink(idle=False)
    memory.copy(0, 4, 0, 192)
    memory.shrink(idle=False)
    assert (run(memory, 4, tokens, 192, 600) == wanted).all()


def test_memory_that_is_full_of_given_up_cells_is_compacted(model: SpanModel, wanted: Floats) -> None:
    memory, tokens = opened(model, positions=640), text(600)
    run(memory, 1, text(30, seed=1), 0, 30)
    run(memory, 0, tokens, 0, 500)
    for _ in range(10):
        run(memory, 0, tokens, 500, 600)
    assert memory.positions == 1024
    assert (run(memory, 0, tokens, 300, 600) == wanted).all()
    assert (run(memory, 1, text(31, seed=1), 30, 31) == run(opened(model), 0, text(31, seed=1), 0, 31)).all()


def test_memory_that_grows(model: SpanModel, wanted: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "FIRST_POSITIONS", 64)
    memory, tokens = opened(model), text(600)
    assert memory.positions == 256
    for start in range(0, 600, 40):
        last = run(memory, 0, tokens, start, start + 40)
        run(memory, 1, text(600, seed=1), start, start + 40)
    assert (last == wanted).all()


def test_a_prefix_of_several_texts_in_another_order(model: SpanModel, wanted: Floats) -> None:
    memory, tokens = opened(model), text(600)
    run(memory, 1, tokens, 0, 400)
    run(memory, 2, tokens, 0, 100)
    memory.copy(2, 0, 0, 96)
    memory.copy(1, 0, 96, 320)
    memory.truncate(1, 0)
    memory.drop(2, 0, 32)
    assert (run(memory, 0, tokens, 320, 600) == wanted).all()


def test_memory_that_cannot_grow_stays(model: SpanModel, wanted: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, tokens = opened(model), text(600)
    run(memory, 0, tokens, 0, 500)
    reopen = memory._open
    sizes = iter([None, memory.positions])
    monkeypatch.setattr(memory, "_open", lambda *_: size and reopen(size, False) if (size := next(sizes)) else None)
    with pytest.raises(PassFailed, match="too little memory for 1024 positions"):
        memory.resize(1024)
    assert (run(memory, 0, tokens, 500, 600) == wanted).all()


def test_full_disk_does_not_keep_memory_from_growing(model: SpanModel, wanted: Floats, tmp_path: Path) -> None:
    memory, tokens = opened(model, scratch_dir=tmp_path / "none"), text(600)
    run(memory, 0, tokens, 0, 500)
    memory.resize(1024)
    assert (run(memory, 0, tokens, 500, 600) == wanted).all()


def test_memory_that_cannot_be_read_back_is_lost(model: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    memory = opened(model)
    run(memory, 0, text(50), 0, 50)
    monkeypatch.setattr(context, "TemporaryFile", lambda **_: Damaged())
    with pytest.raises(EngineLost, match=r"lost what its sessions held: .*Input/output error"):
        memory.resize(1024)


def test_rows_that_do_not_follow_are_refused(model: SpanModel) -> None:
    memory = opened(model)
    run(memory, 0, text(20), 0, 20)
    with pytest.raises(PassFailed, match="no longer in KV memory"):
        run(memory, 0, text(40), 30, 40)
