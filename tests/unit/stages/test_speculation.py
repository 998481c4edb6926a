"""Speculative decoding: prompt lookup, and drafts on the first stage."""

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.stages.speculation import DraftTracker, PromptLookup, repetitiveness


class Oracle:
    """Drafts the text, and wrong tokens from some place on."""

    def __init__(self, text: Sequence[int], lies_from: int) -> None:
        self._text = [token if place < lies_from else token + 1 for place, token in enumerate(text)]
        self._known = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self._known += len(tokens)

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        then(self._text[self._known : self._known + count])

    def close(self) -> None:
        raise AssertionError("nobody closes it here")


class Silent(Oracle):
    """Never answers."""

    def __init__(self) -> None:
        super().__init__((), 0)

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        pass


def feed(
    tracker: DraftTracker, position: int, tokens: Sequence[int], draws: int = 1
) -> tuple[int, list[int], tuple[int, ...]]:
    """Return the first row's position, the rows with the drafts behind them, and the drafts."""
    fed: list[tuple[int, list[int], tuple[int, ...]]] = []
    tracker.feed(
        position, tokens, draws, lambda first, rows, drafts: fed.append((first, [*rows, *drafts], tuple(drafts)))
    )
    return fed[0]


def looked_up(tokens: Sequence[int], count: int) -> list[int]:
    lookup = PromptLookup()
    lookup.extend(tokens)
    return lookup.look_up(count)


def test_prompt_lookup_drafts_what_followed_before() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == [4, 5, 9]
    assert looked_up([1, 2, 3, 7, 0, 1, 2, 3, 8, 0, 1, 2, 3], 1) == [8]  # the last time counts
    assert looked_up([5, 2, 3, 7, 1, 2, 3], 2) == [7, 1]  # two tokens, where three were never seen
    assert looked_up([1, 2, 3, 4], 4) == []
    assert looked_up([], 4) == []


def test_prompt_lookup_past_the_end_continues_with_itself() -> None:
    assert looked_up([7, 8, 7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]
    assert looked_up([1] * 4, 3) == [1, 1, 1]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_prompt_lookup_takes_the_last_occurrence(tokens: list[int], count: int) -> None:
    found: list[int] = []
    for length in (3, 2):
        places = [at for at in range(length, len(tokens)) if tokens[at - length : at] == tokens[-length:]]
        if len(tokens) >= length and places:
            found = tokens[places[-1] :]
            break
    assert looked_up(tokens, count) == [found[at % len(found)] for at in range(count if found else 0)]


def test_prompt_lookup_takes_constant_time_per_token() -> None:
    lookup = PromptLookup()
    tokens = [random.Random(1).randrange(9) for _ in range(200_000)]
    for token in tokens:
        lookup.extend((token,))
        lookup.look_up(4)


def test_repetitiveness_is_a_share_of_the_tokens() -> None:
    assert repetitiveness([]) == 0
    assert repetitiveness(range(100)) == 0
    assert repetitiveness([1, 2, 3, 4] * 25) == pytest.approx(0.93, abs=0.02)


# Drafts and the rows to compute


def test_computes_every_row_once_without_drafts() -> None:
    tracker = DraftTracker(positions=100)
    assert feed(tracker, 0, [1, 2, 3], 0) == (0, [1, 2, 3], ())
    assert feed(tracker, 3, [4]) == (3, [4], ())
    assert feed(tracker, 4, [5]) == (4, [5], ())


def test_does_not_compute_cached_rows() -> None:
    tracker = DraftTracker(start=3, positions=100)
    assert feed(tracker, 0, [1, 2], 0) == (2, [], ())
    assert feed(tracker, 2, [3, 4, 5]) == (3, [4, 5], ())
    # Nothing but the last row is left.
    assert feed(DraftTracker(start=4, positions=100), 0, [1, 2, 3, 4, 5]) == (4, [5], ())


def test_accepted_drafts_are_not_computed_again() -> None:
    text = list(range(10, 40))
    tracker = DraftTracker(positions=100, draft_tokens=4, drafter=Oracle(text, lies_from=6))
    assert feed(tracker, 0, text[:3]) == (0, [10, 11, 12, 13, 14, 15, 17], (13, 14, 15, 17))
    # Three were right; the fourth token is the model's own.
    assert feed(tracker, 3, text[3:7]) == (6, [16, 18, 19, 20, 21], (18, 19, 20, 21))
    # None was right: fewer are tried.
    assert feed(tracker, 7, text[7:8]) == (7, [17, 19], (19,))


def test_no_draft_exceeds_reserved_positions() -> None:
    text = list(range(50))
    tracker = DraftTracker(positions=6, draft_tokens=8, drafter=Oracle(text, lies_from=99))
    assert feed(tracker, 0, text[:3]) == (0, [0, 1, 2, 3, 4], (3, 4))
    assert feed(tracker, 3, text[3:6]) == (5, [5], ())


@pytest.mark.parametrize("position", [1, 4])
def test_tokens_that_do_not_follow_are_refused(position: int) -> None:
    tracker = DraftTracker(positions=100)
    feed(tracker, 0, [1, 2, 3])
    with pytest.raises(ValueError, match="do not follow"):
        feed(tracker, position, [9])


def test_rows_are_refused_while_drafts_are_pending() -> None:
    tracker = DraftTracker(positions=100, draft_tokens=4, drafter=Silent())
    tracker.feed(0, [1, 2, 3], 1, lambda *_: None)
    with pytest.raises(ValueError, match="a token was to be drawn first"):
        tracker.feed(3, [4], 1, lambda *_: None)


@given(st.data())
def test_computed_rows_are_those_of_the_text_whatever_is_drafted(data: st.DataObject) -> None:
    """A last stage that knows the text accepts drafts as it must; each position ends up computed with its token."""
    text = data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=40))
    prompt = data.draw(st.integers(1, len(text) - 1))
    start = data.draw(st.integers(0, prompt - 1))
    tracker = DraftTracker(start=start, positions=len(text), draft_tokens=4, drafter=PromptLookup())
    held = text[:start]
    position, tokens = 0, text[:prompt]
    while True:
        first, rows, drafts = feed(tracker, position, tokens)
        assert first <= len(held)
        held = [*held[:first], *rows]
        position += len(tokens)
        assert held[:position] == text[:position]
        if position == len(text):
            break
        drawn = text[position : position + 1]
        for guess in drafts:
            if guess != drawn[-1] or position + len(drawn) == len(text):
                break
            drawn = text[position : position + len(drawn) + 1]
        tokens = drawn
