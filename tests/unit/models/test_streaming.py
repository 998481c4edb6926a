from collections.abc import Callable, Coroutine, Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.models.streaming import StopFinder, StreamDecoder
from node.models.tokenizer_worker import Tokenizer
from node.models.vocabulary import TokenKind
from tests.unit.models.vocabularies import InThisProcess, byte_fallback, byte_level, metaspace

VOCABULARIES: list[Callable[[], str]] = [byte_level, byte_fallback, metaspace]


def now(work: Coroutine[Any, Any, str]) -> str:
    """Run what waits for nothing."""
    try:
        work.send(None)
    except StopIteration as result:
        return str(result.value)
    raise AssertionError("it waited")


def streamed(tokenizer: Tokenizer, tokens: list[int], prompt: Sequence[int] = ()) -> list[str]:
    here: Any = InThisProcess(tokenizer)
    decoder = StreamDecoder(here, prompt=prompt)
    return [*(now(decoder.feed(token)) for token in tokens), decoder.finish()]


def with_invalid_bytes_replaced(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Return tokens of which no run of bytes is invalid UTF-8: behind its last character each byte is U+FFFD.

    The tokenizers library replaces all bytes of a run that is not valid, also the characters at its beginning, which
    are out by then.
    """
    vocabulary = tokenizer.vocabulary()
    if vocabulary.is_byte_level or "\ufffd" not in tokenizer.decode(tokens):
        return tokens
    bytes_first = vocabulary.kinds.index(TokenKind.BYTE)
    replaced: list[int] = []
    for kind, group in groupby(filter(vocabulary.has_text, tokens), vocabulary.kind_of):
        run = list(group)
        valid = len(run)
        while kind is TokenKind.BYTE and not is_utf8(bytes(token - bytes_first for token in run[:valid])):
            valid -= 1
        replaced += run[:valid] + [bytes_first + byte for byte in "\ufffd".encode()] * (len(run) - valid)
    return replaced


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(data=st.data())
def test_streamed_text_is_the_text_of_the_whole(vocabulary: Callable[[], str], data: st.DataObject) -> None:
    tokenizer = Tokenizer(vocabulary())
    size = max(len(tokenizer.vocabulary().kinds), len(tokenizer.vocabulary().ends))
    # Any tokens at all: a model may stop in the middle of a character, or never make sense.
    tokens = data.draw(st.lists(st.integers(0, size + 3), max_size=40))
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(with_invalid_bytes_replaced(tokenizer, tokens))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(data=st.data())
def test_streamed_text_is_what_the_tokens_add_to_the_prompt(vocabulary: Callable[[], str], data: st.DataObject) -> None:
    tokenizer = Tokenizer(vocabulary())
    size = max(len(tokenizer.vocabulary().kinds), len(tokenizer.vocabulary().ends))
    any_tokens = st.lists(st.integers(0, size + 3), max_size=20)
    texts = st.text(max_size=20).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    prompt, tokens = data.draw(any_tokens | texts), data.draw(any_tokens | texts)
    said = tokenizer.decode(prompt)
    whole = tokenizer.decode(with_invalid_bytes_replaced(tokenizer, [*prompt, *tokens]))
    text = "".join(streamed(tokenizer, tokens, prompt))
    # Else the prompt ends in a character, whose replacement its text has, or with bytes that are none.
    if "\ufffd" not in said or (tokenizer.vocabulary().is_byte_level and whole.startswith(said)):
        assert said + text == whole


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_character_that_the_prompt_begins_is_complete_in_the_text(vocabulary: Callable[[], str]) -> None:
    tokenizer = Tokenizer(vocabulary())
    tokens = tokenizer.encode("日本語 🎉 fox 🦀🦀 fox", add_special_tokens=False)
    whole = tokenizer.decode(tokens)
    for count in range(len(tokens)):
        said = tokenizer.decode(tokens[:count])
        text = "".join(streamed(tokenizer, tokens[count:], tokens[:count]))
        assert whole.endswith(text)
        characters = whole.removesuffix(text)
        assert said == characters or "\ufffd" in said
        others = tokenizer.encode("fox", add_special_tokens=False)
        assert "\ufffd" not in "".join(streamed(tokenizer, others, tokens[:count])), "the prompt's text has it"


def test_prompt_is_read_from_its_end_however_long_it_is() -> None:
    tokenizer = Tokenizer(byte_fallback())
    word, crab = tokenizer.encode(" fox", add_special_tokens=False)[-1:], tokenizer.encode("🦀")[-4:]
    for prompt, expected in (
        (word * 5000, " fox🦀"),
        (word + [1] * 900, " fox🦀"),
        (crab * 5000, " fox🦀"),
        ([*crab * 5000, *crab[:3]], " fox🦀"),
        ([1, 2], "fox🦀"),
    ):
        here: Any = InThisProcess(tokenizer)
        decoder = StreamDecoder(here, prompt=prompt)
        text = "".join(now(decoder.feed(token)) for token in [*word, *crab])
        assert text == expected
        assert sum(here.decoded) < 100


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_special_tokens_that_mark_something_are_text_on_request(vocabulary: Callable[[], str]) -> None:
    tokenizer = Tokenizer(vocabulary())
    here: Any = InThisProcess(tokenizer)
    here.marks = {0: "[TOOL_CALLS]"}
    words = tokenizer.encode("a fox", add_special_tokens=False)
    for shows, expected in ((True, "a fox[TOOL_CALLS]a fox"), (False, "a foxa fox")):
        decoder = StreamDecoder(here, shows_marks=shows)
        text = "".join([*(now(decoder.feed(token)) for token in [*words, 0, *words]), decoder.finish()])
        assert text.replace(" a", "a") == expected


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(text=st.text(max_size=60))
def test_no_piece_of_a_sensible_text_has_half_a_character(vocabulary: Callable[[], str], text: str) -> None:
    tokenizer = Tokenizer(vocabulary())
    tokens = tokenizer.encode(text)
    pieces = streamed(tokenizer, tokens)
    whole = tokenizer.decode(tokens)
    assert "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in whole


def test_bytes_of_one_character_come_out_together() -> None:
    for vocabulary in (byte_level, byte_fallback):
        tokenizer = Tokenizer(vocabulary())
        pieces = [piece for piece in streamed(tokenizer, tokenizer.encode("a🦀b")) if piece]
        assert "".join(pieces) == "a🦀b"
        assert any("🦀" in piece for piece in pieces)


def test_character_of_bytes_comes_out_with_its_last_byte() -> None:
    tokenizer = Tokenizer(byte_fallback())
    tokens = tokenizer.encode("a。🦀🦀", add_special_tokens=False)
    assert len(tokens) == 1 + 3 + 4 + 4
    assert streamed(tokenizer, tokens) == ["a", "", "", "。", "", "", "", "🦀", "", "", "", "🦀", ""]


def test_invalid_bytes_leave_the_characters_before_them() -> None:
    tokenizer = Tokenizer(byte_fallback())
    letter, *crab = tokenizer.encode("a🦀", add_special_tokens=False)
    assert "".join(streamed(tokenizer, [letter, *crab, *crab[:2]])) == "a🦀\ufffd\ufffd"
    assert "".join(streamed(tokenizer, [*crab, *crab[1:], letter])) == "🦀\ufffd\ufffd\ufffd a"


def test_space_behind_invalid_bytes_is_not_one_at_the_beginning() -> None:
    tokenizer = Tokenizer(byte_fallback())
    invalid, space = (tokenizer.vocabulary().kinds.index(TokenKind.BYTE) + byte for byte in (0x88, 0x20))
    word = tokenizer.encode("fox", add_special_tokens=False)
    assert "".join(streamed(tokenizer, [invalid, space, *word])) == "\ufffd\ufffd fox"


def test_special_tokens_have_no_text_and_break_no_character() -> None:
    tokenizer = Tokenizer(byte_fallback())
    crab = tokenizer.encode("🦀")[-4:]
    tokens = [1, *crab[:2], 2, *crab[2:], 1]
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens) == "🦀"


@pytest.mark.parametrize(("vocabulary", "calls", "most"), [(byte_level, 0, 0), (byte_fallback, 1, 3)])
def test_streaming_decodes_a_constant_number_of_tokens_for_each(
    vocabulary: Callable[[], str], calls: int, most: int
) -> None:
    tokenizer = Tokenizer(vocabulary())
    tokens = tokenizer.encode(" word" * 10)[-10:] * 30
    here: Any = InThisProcess(tokenizer)
    decoder = StreamDecoder(here)
    for token in tokens:
        now(decoder.feed(token))
    assert len(here.decoded) <= calls * len(tokens)
    assert max(here.decoded, default=0) <= most


def find(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    finder = StopFinder(stops)
    text = "".join(finder.feed(piece) for piece in pieces)
    return text + finder.finish(), finder.found


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "found"),
    [
        (["STOP"], ["no", " such", " thing"], "no such thing", None),
        (["STOP"], ["be", "fore ST", "OP", " after"], "before ", "STOP"),
        (["STOP"], ["S", "T", "O", "P"], "", "STOP"),
        (["STOP"], ["ST", "ST", "OP"], "ST", "STOP"),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", "\n\n"),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["abcd", "bc"], ["abcd"], "a", "bc"),
        (["bc", "abc"], ["xabc"], "x", "abc"),
        (["STOP"], ["unfinished ST"], "unfinished ST", None),
        ([], ["anything"], "anything", None),
        ([""], ["anything"], "anything", None),
    ],
)
def test_a_stop_string_ends_the_text(stops: list[str], pieces: list[str], text: str, found: str | None) -> None:
    assert find(stops, pieces) == (text, found)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    finder = StopFinder(["END."])
    assert finder.feed("the EN") == "the "
    assert finder.feed("ORMOUS ") == "ENORMOUS "
    assert finder.feed("E") == ""
    assert finder.finish() == "E"
    assert finder.found is None


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=5),
)
def test_chunking_of_the_text_makes_no_difference(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(edges)]
    expected, found = find(stops, list(text))
    assert find(stops, pieces) == (expected, found)
    first_end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if first_end is None:
        assert (expected, found) == (text, None)
    else:
        assert found is not None
        assert text.startswith(expected + found)
        assert len(expected + found) == first_end
