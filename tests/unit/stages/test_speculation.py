"""Guesses, and what the first stage makes of tokens that arrive."""

import random
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.stages.speculation import Drafter, PromptLookup, TokenFeed, repetitiveness


class Oracle:
    """Knows the text, and lies from some place on."""

    def __init__(self, text: Sequence[int], lies_from: int) -> None:
        self._text = [token if place < lies_from else token + 1 for place, token in enumerate(text)]
        self._known = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self._known += len(tokens)

    def draft(self, count: int, then: Callable[[Sequence[int]], None]) -> None:
        then(self._text[self._known : self._known + count])

    def close(self) -> None:
        raise AssertionError("nobody closes it here")


class Feeding:
    """A feed with who guesses for it, as a first stage puts them together."""

    def __init__(self, feed: TokenFeed, drafter: Drafter) -> None:
        self.feed = feed
        self._drafter = drafter

    def take(self, position: int, tokens: Sequence[int], draws: int) -> tuple[int, list[int], tuple[int, ...]]:
        first, rows = self.feed.take(position, tokens, draws)
        self._drafter.extend(tokens)
        if draws == 1 and self.feed.wanted:
            self._drafter.draft(self.feed.wanted, self.feed.guess)
        drafts = self.feed.guesses
        return first, [*rows, *drafts], drafts


def looked_up(tokens: Sequence[int], count: int) -> list[int]:
    lookup = PromptLookup()
    lookup.extend(tokens)
    return lookup.look_up(count)


def test_what_followed_before_is_guessed_to_follow_again() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == [4, 5, 9]
    assert looked_up([1, 2, 3, 7, 0, 1, 2, 3, 8, 0, 1, 2, 3], 1) == [8]  # the last time counts
    assert looked_up([5, 2, 3, 7, 1, 2, 3], 2) == [7, 1]  # two tokens, where three were never seen
    assert looked_up([1, 2, 3, 4], 4) == []
    assert looked_up([], 4) == []


def test_a_guess_beyond_the_end_goes_on_with_itself() -> None:
    assert looked_up([7, 8, 7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]
    assert looked_up([1] * 4, 3) == [1, 1, 1]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_a_guess_is_what_followed_the_same_tokens_last(tokens: list[int], count: int) -> None:
    found: list[int] = []
    for length in (3, 2):
        places = [at for at in range(length, len(tokens)) if tokens[at - length : at] == tokens[-length:]]
        if len(tokens) >= length and places:
            found = tokens[places[-1] :]
            break
    assert looked_up(tokens, count) == [found[at % len(found)] for at in range(count if found else 0)]


def test_the_index_takes_the_same_time_for_each_token() -> None:
    lookup = PromptLookup()
    tokens = [random.Random(1).randrange(9) for _ in range(200_000)]
    started_s = time.process_time()
    for token in tokens:
        lookup.extend((token,))
        lookup.look_up(4)
    assert time.process_time() - started_s < 20  # a search through the text would take hours


def test_repetition_is_a_share_of_the_tokens() -> None:
    assert repetitiveness([]) == 0
    assert repetitiveness(range(100)) == 0
    assert repetitiveness([1, 2, 3, 4] * 25) == pytest.approx(0.93, abs=0.02)


# The feed


def test_without_guesses_every_row_is_computed_once() -> None:
    feed = TokenFeed(positions=100)
    assert feed.take(0, [1, 2, 3], 0) == (0, [1, 2, 3])
    assert feed.take(3, [4], 1) == (3, [4])
    assert feed.take(4, [5], 1) == (4, [5])


def test_what_is_cached_is_not_computed() -> None:
    feed = TokenFeed(start=3, positions=100)
    assert feed.take(0, [1, 2], 0) == (2, [])
    assert feed.take(2, [3, 4, 5], 1) == (3, [4, 5])
    # Nothing but the last row is left.
    assert TokenFeed(start=4, positions=100).take(0, [1, 2, 3, 4, 5], 1) == (4, [5])


def test_right_guesses_are_not_computed_again() -> None:
    text = list(range(10, 40))
    feed = Feeding(TokenFeed(positions=100, draft_tokens=4), Oracle(text, lies_from=6))
    assert feed.take(0, text[:3], 1) == (0, [10, 11, 12, 13, 14, 15, 17], (13, 14, 15, 17))
    # Three were right; the fourth token is the model's own.
    assert feed.take(3, text[3:7], 1) == (6, [16, 18, 19, 20, 21], (18, 19, 20, 21))
    assert (feed.feed.drafted, feed.feed.accepted) == (4, 3)
    # None was right: fewer are tried.
    assert feed.take(7, text[7:8], 1) == (7, [17, 19], (19,))


def test_no_guess_reaches_beyond_what_is_reserved() -> None:
    text = list(range(50))
    feed = Feeding(TokenFeed(positions=6, draft_tokens=8), Oracle(text, lies_from=99))
    assert feed.take(0, text[:3], 1) == (0, [0, 1, 2, 3, 4], (3, 4))
    assert feed.take(3, text[3:6], 1) == (5, [5], ())


@pytest.mark.parametrize("position", [1, 4])
def test_tokens_that_do_not_follow_are_refused(position: int) -> None:
    feed = TokenFeed(positions=100)
    feed.take(0, [1, 2, 3], 1)
    with pytest.raises(ValueError, match="do not follow"):
        feed.take(position, [9], 1)


@given(st.data())
def test_whatever_is_guessed_the_rows_are_those_of_the_text(data: st.DataObject) -> None:
    """A last stage that knows the text accepts guesses as it must; each position ends up computed with its token."""
    text = data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=40))
    prompt = data.draw(st.integers(1, len(text) - 1))
    start = data.draw(st.integers(0, prompt - 1))
    feed = Feeding(TokenFeed(start=start, positions=len(text), draft_tokens=4), PromptLookup())
    held = text[:start]
    position, tokens = 0, text[:prompt]
    while True:
        first, rows, drafts = feed.take(position, tokens, 1)
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
    assert feed.feed.accepted <= feed.feed.drafted
