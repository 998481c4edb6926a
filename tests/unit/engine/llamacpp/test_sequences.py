"""Cached prompts leave a context when they are many, and come back to the bit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from node.engine.interface import PAGE_POSITIONS
from node.engine.kv_allocator import KvReservation
from node.engine.llamacpp.context import FIRST_POSITIONS, ContextOptions, SequenceRows, SpanContext
from node.engine.llamacpp.kv_budget import ROUNDED_TO, KvBudget
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.sequences import Sequences
from node.engine.llamacpp.span_model import SpanModel
from tests.unit.engine.llamacpp.architectures import ARCHITECTURES, VOCABULARY, write_model

LENGTH = 10 * PAGE_POSITIONS
CACHED = 9 * PAGE_POSITIONS
TEXTS = np.random.default_rng(0).integers(0, VOCABULARY, (12, LENGTH)).astype(np.int32)


class Texts:
    """Sessions of one prompt each, of which all whole pages stay cached."""

    def __init__(self, model: SpanModel, budget_positions: int = 16384) -> None:
        options = ContextOptions(first=True, last=True, block_count=1, positions=16384, sequences=20, threads=1)
        self.budget = KvBudget(budget_positions)
        self.context = SpanContext(model, options, self.budget)
        self.sequences = Sequences(self.context, 20, self.budget)

    def begin(self, number: int, copied: Sequence[int] = ()) -> int:
        """Begin a session on ten pages of its own."""
        pages = tuple(range(10 * number, 10 * number + 10))
        return self.sequences.begin(KvReservation(positions=LENGTH, pages=pages, copied=tuple(copied)))

    def run(self, sequence: int, text: int, start: int, end: int) -> npt.NDArray[np.float32]:
        return self.context.run([SequenceRows(sequence, start, TEXTS[text, start:end], 1)])[0]


@pytest.fixture(scope="module", params=["llama3", "gemma2", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    """Full attention; a sliding window in every second block, and in five of six."""
    path: Path = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    write_model(ARCHITECTURES[request.param], path, GGMLQuantizationType.Q8_0)
    return SpanModel(load_library(), path)


@pytest.fixture(scope="module")
def wanted(model: SpanModel) -> list[npt.NDArray[np.float32]]:
    """The logits behind each text."""
    found = []
    for number in range(len(TEXTS)):
        texts = Texts(model)
        found.append(texts.run(texts.begin(0), number, 0, LENGTH))
    return found


def test_cached_prompts_beyond_what_sessions_hold_are_not_in_the_context(
    model: SpanModel, wanted: list[npt.NDArray[np.float32]]
) -> None:
    texts = Texts(model)
    for number in range(10):
        sequence = texts.begin(number)
        assert (texts.run(sequence, number, 0, LENGTH) == wanted[number]).all()
        texts.sequences.close(sequence)
        assert texts.context.needed <= 2 * LENGTH + FIRST_POSITIONS
    texts.sequences.set_aside()
    assert texts.context.needed <= FIRST_POSITIONS + PAGE_POSITIONS
    for number in (3, 9, 0):  # set aside, still there, set aside
        cached = range(10 * number, 10 * number + 9)
        sequence = texts.begin(100 + number, cached)
        assert (texts.run(sequence, number, CACHED, LENGTH) == wanted[number]).all(), number
        texts.sequences.forget([10 * number + 9, *range(10 * (100 + number), 10 * (100 + number) + 10)])
        texts.sequences.close(sequence)
    sequence = texts.begin(200, range(30, 34))
    assert (texts.run(sequence, 3, 4 * PAGE_POSITIONS, LENGTH) == wanted[3]).all(), "a part of it"


def test_prompts_of_open_sessions_and_the_latest_of_closed_ones_stay(model: SpanModel) -> None:
    texts = Texts(model)
    held = [texts.begin(number) for number in range(4)]
    for number, sequence in enumerate(held):
        texts.run(sequence, number, 0, LENGTH)
    texts.sequences.close(held[0])
    texts.begin(10)
    assert [texts.context.end(sequence) for sequence in held] == [LENGTH] * 4, "no more than open ones hold"
    texts.sequences.close(held[1])
    texts.sequences.close(held[2])
    texts.sequences.set_aside()
    assert [texts.context.end(sequence) for sequence in held] == [0, 0, LENGTH, LENGTH]


def test_a_prompt_that_is_set_aside_is_given_up_page_by_page(model: SpanModel) -> None:
    texts = Texts(model)
    for number in range(3):
        sequence = texts.begin(number)
        texts.run(sequence, number, 0, LENGTH)
        texts.sequences.close(sequence)
    texts.begin(3)
    aside = texts.sequences._aside
    assert set(aside) == {*range(20)}
    texts.sequences.forget([0, 1, 2])
    assert (len(aside), aside.positions) == (17, 17 * PAGE_POSITIONS)


def test_prompts_stay_in_the_context_while_a_session_shares_their_cells(model: SpanModel) -> None:
    texts = Texts(model)
    before = texts.begin(0)
    texts.run(before, 0, 0, LENGTH)
    texts.sequences.close(before)
    turn = texts.begin(1, range(9))
    texts.run(turn, 0, CACHED, LENGTH)
    for number in (2, 3):
        other = texts.begin(number)
        texts.run(other, number, 0, LENGTH)
        texts.sequences.close(other)
    texts.sequences.set_aside()
    assert texts.context.end(before) == LENGTH
    texts.sequences.close(turn)
    texts.sequences.set_aside()
    assert texts.context.end(before) == 0


def test_prompts_that_are_set_aside_take_no_more_memory_than_there_is(
    model: SpanModel, wanted: list[npt.NDArray[np.float32]]
) -> None:
    positions = 8 * LENGTH
    texts = Texts(model, positions)

    def taken() -> int:
        return texts.context.positions + texts.sequences._aside.positions

    held = [texts.begin(number) for number in range(5)]
    for number, sequence in enumerate(held):
        texts.run(sequence, number, 0, LENGTH)
    for sequence in held[:4]:
        texts.sequences.close(sequence)
    texts.sequences.set_aside()
    assert texts.sequences._aside.positions >= LENGTH
    assert taken() <= positions
    assert (texts.run(held[4], 4, LENGTH - 1, LENGTH) == wanted[4]).all()
    texts.sequences.close(held[4])
    for number in range(5, 9):
        texts.sequences.forget(range(10 * (number - 5), 10 * (number - 5) + 10))
        sequence = texts.begin(number)
        assert taken() <= positions
        assert (texts.run(sequence, number, 0, LENGTH) == wanted[number]).all()
        texts.sequences.close(sequence)


def test_a_session_that_begins_waits_for_no_move_and_a_trim_makes_one(
    model: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Texts(model, 8 * LENGTH)
    held = [texts.begin(number) for number in range(5)]
    for number, sequence in enumerate(held):
        texts.run(sequence, number, 0, LENGTH)
    texts.context.resize(8 * LENGTH)
    for sequence in held:
        texts.sequences.close(sequence)
    resize, moves = texts.context.resize, list[int]()

    def count(positions: int) -> None:
        moves.append(positions)
        resize(positions)

    monkeypatch.setattr(texts.context, "resize", count)
    texts.begin(5)
    assert moves == []
    texts.sequences.set_aside()
    assert len(moves) == 1
    assert set(texts.sequences._aside) == {*range(30, 40)}
    for _ in range(2):
        texts.sequences.set_aside()
    assert set(texts.sequences._aside) == {*range(40)}, "but for the latest"


def test_context_without_positions_is_a_small_one(model: SpanModel) -> None:
    assert Texts(model).context._parameters(0, is_watched=False).n_ctx == ROUNDED_TO
