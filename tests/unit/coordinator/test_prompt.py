"""What a conversation and what is asked of its answer become: token ids, and how the last stage draws."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer as Trained

from node.coordinator.chat import ChatMessage
from node.coordinator.prompt import chat_format_of, read_prompt, sampling_of
from node.coordinator.submission import JobError, JobRequest, RequestOrigin
from node.models.chat_template import ChatTemplate
from node.models.library import KnownModel
from node.models.tokenizer_service import Limits, ModelTokenizer
from node.models.tokenizer_worker import Tokenizer, _answer
from node.models.vocabulary import NO_TOKENS
from protocol.identity import ModelId
from tests.unit.models.vocabularies import byte_level

TURNS = """
{%- for m in messages %}<s>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<s>assistant:{% if BLOCK %}BLOCK{% endif %}{% endif %}"""
AS_QWEN3 = TURNS.replace("{% if BLOCK %}BLOCK", "{% if enable_thinking is false %}<think>\n\n</think>\n\n")
AS_DEEPSEEK_R1 = TURNS.replace("{% if BLOCK %}BLOCK", "{% if true %}<think>\n")
WITHOUT = TURNS.replace("{% if BLOCK %}BLOCK", "{% if false %}")
SCHEMA = '{"type": "object"}'


class InProcess:
    """Answers as the process of a tokenizer does, in this one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.askers: list[str] = []

    async def ask(
        self, subject: str, request: Mapping[str, Any], cpu_s: float, *, priority: int = 1, asker: str = ""
    ) -> dict[str, Any]:
        self.askers.append(asker)
        return _answer(self._tokenizer, dict(request))


def model_with(template: str, *, marks: bool = True) -> KnownModel:
    """Return a model; `marks`: its vocabulary has `<think>` and `</think>`."""
    trained = Trained.from_str(byte_level())
    if marks:
        trained.add_tokens(["<think>", "</think>"])
    return model_of(Tokenizer(trained.to_str(), {}, template, [0]))


def model_of(tokenizer: Tokenizer) -> KnownModel:
    asked = ModelTokenizer(
        cast("Any", InProcess(tokenizer)), Limits(), NO_TOKENS, tokenizer.stop_tokens, True, tokenizer.tool_format,
        tokenizer.reasons, tokenizer.reasoning_tokens, tokenizer.marks,
    )  # fmt: skip
    manifest = SimpleNamespace(vocabulary_size=600, max_positions=500)
    return cast("KnownModel", SimpleNamespace(tokenizer=asked, **vars(manifest)))


async def test_tokenizer_is_asked_for_the_key_of_the_request() -> None:
    model = model_with(TURNS)
    known = KnownModel(ModelId("ab" * 32), "tiny", cast("Any", model), model.tokenizer)
    for key in ("key", ""):
        await read_prompt(job(origin=RequestOrigin(key_sha256=key)), known)
    assert cast("Any", model.tokenizer)._worker.askers == ["key", "key", "", ""]


def job(*turns: tuple[str, str], **fields: Any) -> JobRequest:
    messages = tuple(ChatMessage(role=role, content=content) for role, content in turns or [("user", "fox?")])
    return JobRequest(model="tiny", messages=messages, **fields)


async def reasoning_of(template: str, *, marks: bool = True, **fields: Any) -> tuple[bool, bool, bool, bool]:
    """Return whether an answer may reason, and has begun to; and which tokens around it the last stage knows."""
    model = model_with(template, marks=marks)
    request = job(**fields)
    prompt = await read_prompt(request, model)
    sampling = sampling_of(request, model, prompt)
    assert prompt.chat_format is not None
    begin, end = model.tokenizer.reasoning_tokens or (None, None)
    assert sampling.reasoning_begin in {None, begin}
    assert sampling.reasoning_end in {None, end}
    sampling.check()
    told = sampling.reasoning_begin is not None, sampling.reasoning_end is not None
    return prompt.chat_format.reasons, prompt.chat_format.reasoning_began, *told


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (WITHOUT, {}, (False, False, False, False)),
        (AS_QWEN3, {}, (True, False, True, True)),
        (AS_QWEN3, {"enable_thinking": True}, (True, False, True, True)),
        (AS_QWEN3, {"enable_thinking": False}, (False, False, False, False)),
        (AS_DEEPSEEK_R1, {}, (True, True, False, True)),
        (AS_DEEPSEEK_R1, {"enable_thinking": False}, (True, True, False, True)),
    ],
)
async def test_json_begins_behind_reasoning(
    template: str, options: dict[str, Any], expected: tuple[bool, bool, bool, bool]
) -> None:
    assert await reasoning_of(template, json_schema=SCHEMA, template_options=options) == expected


async def test_json_comes_at_once_where_the_end_of_reasoning_is_no_token() -> None:
    for template in (AS_QWEN3, AS_DEEPSEEK_R1):
        assert not any(await reasoning_of(template, marks=False, json_schema=SCHEMA))
    model = model_with(AS_QWEN3, marks=False)
    tokens = (await read_prompt(job(json_schema=SCHEMA), model)).tokens
    assert (await model.tokenizer.decode(tokens))[0].endswith("</think>\n\n"), "the template is told not to reason"


async def test_any_text_may_reason() -> None:
    assert await reasoning_of(AS_QWEN3) == (True, False, False, False)
    assert await reasoning_of(AS_DEEPSEEK_R1) == (True, True, False, False)


async def test_last_turn_of_the_assistant_is_continued() -> None:
    model = model_with(AS_QWEN3)
    turns = ("user", "fox?"), ("assistant", "The quick ")
    prompt = await read_prompt(job(*turns, continue_final_message=True), model)
    expected = await model.tokenizer.encode("<s>user:fox?<|end|><s>assistant:The quick ", add_special_tokens=False)
    assert prompt.tokens == expected
    fresh = await read_prompt(job(*turns), model)
    assert fresh.tokens[: len(expected)] == expected
    assert (await model.tokenizer.decode(fresh.tokens))[0].endswith("assistant:"), "another turn by default"


@pytest.mark.parametrize(("content", "began"), [("<think>\nA", True), ("<think>a</think>b", False), ("a", False)])
async def test_continued_turn_may_be_within_reasoning(content: str, began: bool) -> None:
    request = job(("user", "fox?"), ("assistant", content), continue_final_message=True)
    prompt = await read_prompt(request, model_with(AS_QWEN3))
    assert prompt.chat_format is not None
    assert prompt.chat_format.reasoning_began is began


async def test_answer_begins_in_the_channel_where_the_prompt_ends() -> None:
    trained = Trained.from_str(byte_level())
    trained.add_special_tokens(["<|start|>", "<|channel|>", "<|message|>", "<|return|>"])
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    model = model_of(Tokenizer(trained.to_str(), {}, template, [0]))
    turns = ("user", "fox?"), ("assistant", "The quick ")
    for fields, channel, end in (
        ({}, "", "<|start|>assistant"),
        ({"continue_final_message": True}, "final", "<|message|>The quick "),
        ({"json_schema": SCHEMA}, "final", "<|start|>assistant<|channel|>final<|message|>"),
    ):
        prompt = await read_prompt(job(*turns, **fields), model)
        assert prompt.chat_format is not None
        assert prompt.chat_format.channel == channel
        assert prompt.tokens[-len(trained.encode(end).ids) :] == tuple(trained.encode(end).ids)
    assert chat_format_of(model_with(AS_QWEN3)).channel is None


async def test_turn_that_the_template_leaves_out_cannot_be_continued() -> None:
    model = model_with("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    request = job(("user", "fox?"), ("assistant", "The"), continue_final_message=True)
    with pytest.raises(JobError, match="leaves out the last message"):
        await read_prompt(request, model)


def test_final_message_is_continued_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}]
    for template in (AS_QWEN3, AS_DEEPSEEK_R1, "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"):
        expected = render_jinja_template([turns], chat_template=template, continue_final_message=True)[0][0]
        assert ChatTemplate(template).render(turns, {}, continue_final_message=True) == expected


async def test_token_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(JobError, match=r"has the token id 60000: this model has 0 to 599$"):
        await read_prompt(JobRequest(model="tiny", prompt_tokens=(3, 60000)), model_with(WITHOUT))
