"""The fields that the packages of the protocols declare are all known here: implemented, ignored, or neutral."""

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import anthropic.types as of_anthropic
import ollama._types as of_ollama
import pytest
from anthropic.types import ThinkingConfigParam
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from openai.types import chat as of_chat
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.function_tool_param import FunctionToolParam
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from openai.types.responses.response_text_config_param import ResponseTextConfigParam
from openai.types.shared import ReasoningEffort
from openai.types.shared_params import FunctionDefinition, Reasoning

from node.api.anthropic.requests import COUNT_REQUEST, MESSAGE_REQUEST
from node.api.fields import ObjectForm
from node.api.ollama import embeddings as ollama_embeddings
from node.api.ollama import requests as ollama
from node.api.openai.embeddings import EMBEDDING
from node.api.openai.requests import CHAT, COMPLETION
from node.api.openai.responses import RESPONSE

DECLARED: list[tuple[ObjectForm, str, Any]] = [
    (CHAT, "", ChatParams),
    (CHAT, "messages *", of_chat.ChatCompletionAssistantMessageParam),
    (CHAT, "messages *", of_chat.ChatCompletionToolMessageParam),
    (CHAT, "messages *", of_chat.ChatCompletionUserMessageParam),
    (CHAT, "messages * content *", of_chat.ChatCompletionContentPartTextParam),
    (CHAT, "messages * tool_calls *", of_chat.ChatCompletionMessageFunctionToolCallParam),
    (CHAT, "tools *", of_chat.ChatCompletionFunctionToolParam),
    (CHAT, "tools * function", FunctionDefinition),
    (CHAT, "stream_options", of_chat.ChatCompletionStreamOptionsParam),
    (COMPLETION, "", CompletionCreateParamsStreaming),
    (EMBEDDING, "", EmbeddingCreateParams),
    (RESPONSE, "", ResponseCreateParamsStreaming),
    (RESPONSE, "tools *", FunctionToolParam),
    (RESPONSE, "text", ResponseTextConfigParam),
    (RESPONSE, "reasoning", Reasoning),
    (MESSAGE_REQUEST, "", MessageCreateParamsStreaming),
    (MESSAGE_REQUEST, "messages *", of_anthropic.MessageParam),
    (MESSAGE_REQUEST, "tools *", of_anthropic.ToolParam),
    (MESSAGE_REQUEST, "output_config", of_anthropic.OutputConfigParam),
    (MESSAGE_REQUEST, "thinking", of_anthropic.ThinkingConfigEnabledParam),
    (COUNT_REQUEST, "", of_anthropic.MessageCountTokensParams),
    (ollama.CHAT, "", of_ollama.ChatRequest),
    (ollama.CHAT, "messages *", of_ollama.Message),
    (ollama.CHAT, "options", of_ollama.Options),
    (ollama.GENERATE, "", of_ollama.GenerateRequest),
    (ollama.PULL, "", of_ollama.PullRequest),
    (ollama.SHOW, "", of_ollama.ShowRequest),
    (ollama_embeddings.EMBED, "", of_ollama.EmbedRequest),
    (ollama_embeddings.EMBEDDINGS, "", of_ollama.EmbeddingsRequest),
]
"""Where an object is in a body (`*`: in each element of a list), and its type in a package."""


def alternatives(schema: Any) -> Iterator[Any]:
    """Yield a schema, or those of which it is any."""
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from alternatives(each)
    else:
        yield schema


def schemas_at(form: ObjectForm, place: str) -> list[Any]:
    found = [form.schema]
    for step in place.split():
        inner = [each["items"] if step == "*" else each["properties"][step] for each in found if _has(each, step)]
        found = [each for schema in inner for each in alternatives(schema)]
    return found


def _has(schema: Any, step: str) -> bool:
    return "items" in schema if step == "*" else step in schema.get("properties", {})


@pytest.mark.parametrize(("form", "place", "declared"), DECLARED, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_that_a_package_declares_is_known(form: ObjectForm, place: str, declared: Any) -> None:
    known = {name for schema in schemas_at(form, place) for name in schema.get("properties", {})}
    for each in get_args(declared) or (declared,):
        fields = getattr(each, "model_fields", None) or each.__annotations__
        assert set(fields) - known == set()


def values_at(form: ObjectForm, place: str) -> set[Any]:
    return {value for schema in schemas_at(form, place) for value in schema.get("enum", ())}


def test_every_reasoning_effort_and_kind_of_thinking_is_known() -> None:
    efforts = {effort for literal in get_args(ReasoningEffort) for effort in get_args(literal)}
    assert efforts <= values_at(CHAT, "reasoning_effort") & values_at(RESPONSE, "reasoning effort")
    kinds = {kind for each in get_args(ThinkingConfigParam) for kind in get_args(get_type_hints(each)["type"])}
    assert kinds == values_at(MESSAGE_REQUEST, "thinking type") - {None}
    of_effort = get_type_hints(of_anthropic.OutputConfigParam)["effort"]
    assert {effort for literal in get_args(of_effort) for effort in get_args(literal)} <= values_at(
        MESSAGE_REQUEST, "output_config effort"
    )
