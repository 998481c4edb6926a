"""The text of a job's tokens, with real tokenizers."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from node.coordinator.chat import ChatMessage
from node.coordinator.output_text import OutputText
from node.coordinator.route_output import SampledToken
from node.coordinator.submission import JobRequest
from node.models.tokenizer_worker import Tokenizer
from protocol.messages import FinishReason
from protocol.tensors import TokenLogprobs
from tests.unit.models.vocabularies import InThisProcess, byte_fallback, byte_level, metaspace

FALLBACK = Tokenizer(byte_fallback())


def model_of(tokenizer: Tokenizer) -> Any:
    return SimpleNamespace(tokenizer=InThisProcess(tokenizer))


async def written(
    request: JobRequest, tokens: list[int], tokenizer: Tokenizer = FALLBACK, prompt: Sequence[int] = ()
) -> tuple[OutputText, FinishReason | None, int]:
    """Return a job's text, why it ended, and how many of the tokens came: the last one is the limit."""
    output = OutputText(request, model_of(tokenizer), prompt)
    finish: FinishReason | None = None
    for count, token in enumerate(tokens, 1):
        limit = FinishReason.LENGTH if count == len(tokens) else None
        _, finish = await output.add(SampledToken(token, None, 0.0), limit)
        if finish is not None:
            return output, finish, count
    raise AssertionError("a text ends")


@pytest.mark.parametrize(
    ("text", "stop", "expected", "count"),
    [("The fox 😀", "😀", "The fox ", 7), ("The。😀😀😀😀", "。", "The", 4), ("The 😀。😀😀", "😀。", "The ", 9)],
)
async def test_stop_string_of_byte_tokens_ends_the_text_at_its_last_byte(
    text: str, stop: str, expected: str, count: int
) -> None:
    tokens = FALLBACK.encode(text, add_special_tokens=False)
    output, finish, came = await written(JobRequest(model="m", stop=(stop,)), tokens)
    assert (output.text, output.stop_string, finish, came) == (expected, stop, FinishReason.STOP, count)


@pytest.mark.parametrize("tokenizer", [FALLBACK, Tokenizer(byte_level())])
async def test_stop_string_in_what_is_left_at_the_end_is_the_reason(tokenizer: Tokenizer) -> None:
    cut = tokenizer.encode("fox🦀", add_special_tokens=False)[:-1]
    mark = tokenizer.decode(cut).removeprefix("fox")
    output, finish, _ = await written(JobRequest(model="m", stop=(mark,)), cut, tokenizer)
    assert (output.text, output.stop_string, finish) == ("fox", mark, FinishReason.STOP)
    output, finish, _ = await written(JobRequest(model="m", stop=(mark,), min_tokens=len(cut)), cut, tokenizer)
    assert (output.text, output.stop_string, finish) == ("fox" + mark, None, FinishReason.LENGTH)


TURN = (ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="The quick"))
WHOLE = "The quick brown fox"


@pytest.mark.parametrize("vocabulary", [byte_level, byte_fallback, metaspace])
@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (JobRequest(model="m", prompt="The quick"), " brown fox"),
        (JobRequest(model="m", prompt_tokens=(1,)), " brown fox"),
        (JobRequest(model="m", messages=TURN, continue_final_message=True), " brown fox"),
        (JobRequest(model="m", messages=TURN[:1]), "brown fox"),
    ],
)
async def test_only_the_text_of_a_new_turn_begins_without_its_first_space(
    vocabulary: Callable[[], str], request_: JobRequest, expected: str
) -> None:
    tokenizer = Tokenizer(vocabulary())
    head, whole = (tokenizer.encode(text, add_special_tokens=False) for text in ("The quick", WHOLE))
    assert whole[: len(head)] == head
    output, _, _ = await written(request_, whole[len(head) :], tokenizer, head)
    if vocabulary is byte_level:  # which takes no space from a text
        expected = " brown fox"
    assert output.text == expected


async def test_log_probabilities_of_a_completion_spell_its_text() -> None:
    head, whole = (FALLBACK.encode(text, add_special_tokens=False) for text in ("The quick", WHOLE))
    output = OutputText(JobRequest(model="m", prompt="The quick", top_logprobs=0), model_of(FALLBACK), head)
    deltas = [
        (await output.add(SampledToken(token, None, 0.0, TokenLogprobs(token, -0.5, ())), None))[0]
        for token in whole[len(head) :]
    ]
    assert [delta.text for delta in deltas] == [each.text.decode() for delta in deltas for each in delta.logprobs]
    assert "".join(delta.text for delta in deltas) == " brown fox"
