"""What docs/api-features.md lists, asked of real peers through the unmodified packages.

The demo model says little that is worth reading, so the tests compare what must hold whatever it says: counts, limits,
forms, the same text by another way.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import anthropic
import ollama
import openai
import pydantic
import pytest

from tests.process.daemons import MODEL

TOKENS: Final = 6
TIMEOUT_S: Final = 30.0
USER: Final[list[Any]] = [{"role": "user", "content": "Describe a person."}]
TURN: Final[list[Any]] = [*USER, {"role": "assistant", "content": "Once upon a"}]
SCHEMA: Final = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION: Final = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
TOOL: Final[Any] = {"type": "function", "function": FUNCTION}


class Place(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]


@dataclass(frozen=True)
class Clients:
    """A client of each protocol."""

    url: str
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    ollama: ollama.Client

    @classmethod
    @contextmanager
    def of(cls, url: str) -> Iterator["Clients"]:
        """Yield clients of a node's API."""
        gpt = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT_S)
        claude = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=TIMEOUT_S)
        llama = ollama.Client(host=url, timeout=TIMEOUT_S)
        with gpt, claude, closing(llama._client):
            yield cls(url, gpt, claude, llama)

    def chat(self, **fields: Any) -> Any:
        """Ask for a short greedy answer of a chat."""
        chosen = {"model": MODEL, "messages": USER, "max_tokens": TOKENS, "temperature": 0, **fields}
        return self.openai.chat.completions.create(**chosen)

    def message(self, **fields: Any) -> Any:
        """The same of the Messages API."""
        extra = {"temperature": 0, **fields.pop("extra_body", {})}
        return self.anthropic.messages.create(
            **{"model": MODEL, "messages": USER, "max_tokens": TOKENS, "extra_body": extra, **fields}
        )

    def ollama_chat(self, **fields: Any) -> Any:
        """The same of Ollama's API."""
        options = {"num_predict": TOKENS, "temperature": 0, **fields.pop("options", {})}
        return self.ollama.chat(**{"model": MODEL, "messages": USER, "options": options, **fields})


def openai_chat(clients: Clients) -> None:
    answer = clients.chat(n=2)
    one, other = answer.choices
    assert one.message.content == other.message.content
    assert (one.finish_reason, answer.usage.completion_tokens) == ("length", 2 * TOKENS)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2 * TOKENS


def openai_stream(clients: Clients) -> None:
    whole = clients.chat().choices[0].message.content
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(clients.chat(stream=True, stream_options=wanted, logprobs=True, top_logprobs=2))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole
    scored = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [len(token.top_logprobs) for token in scored] == [2] * TOKENS
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert (sorted(counts), counts[-1]) == (counts, TOKENS)


def openai_asynchronous(clients: Clients) -> None:
    async def stream() -> str:
        async with openai.AsyncOpenAI(base_url=f"{clients.url}/v1", api_key="unused") as client:
            chunks: Any = await client.chat.completions.create(
                model=MODEL, messages=USER, max_tokens=TOKENS, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    assert asyncio.run(stream()) == clients.chat().choices[0].message.content


def openai_sampling(clients: Clients) -> None:
    sampling: dict[str, Any] = {
        "temperature": 1, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.1, "presence_penalty": 0.2,
        "extra_body": {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "metaswarm": {"method": "baseline"}},
    }  # fmt: skip
    one, other = clients.chat(**sampling), clients.chat(**sampling)
    assert one.choices[0].message.content == other.choices[0].message.content
    assert one.metaswarm["method"]["switches"]["speculation"] == "off"
    assert len(one.metaswarm["route"]) == 3
    whole = clients.chat().choices[0].message.content
    stop = whole.split()[1]
    cut = clients.chat(stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def openai_tools(clients: Clients) -> None:
    """The demo model's template knows none: such a request is refused by name, and not answered without them."""
    for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
        with pytest.raises(openai.BadRequestError, match="template knows no tools") as caught:
            clients.chat(tools=[TOOL], tool_choice=choice)
        assert caught.value.param == "tools"
    assert clients.chat(tools=[TOOL], tool_choice="none").choices[0].message.content


def openai_structured(clients: Clients) -> None:
    [answer] = clients.chat(response_format={"type": "json_object"}, max_tokens=60, extra_body={"top_k": 1}).choices
    assert answer.message.content.lstrip().startswith("{")  # 60 tokens may not be enough for its end
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    [answer] = clients.chat(response_format=form, max_tokens=60).choices
    assert json.loads(answer.message.content)["city"] in {"Oslo", "Rome"}
    form = {"type": "json_schema", "name": "place", "schema": SCHEMA}
    job: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 60, "text": {"format": form}}
    response = clients.openai.responses.create(**job, input="Hi")
    assert json.loads(response.output_text)["city"] in {"Oslo", "Rome"}
    parsed = clients.openai.chat.completions.parse(model=MODEL, messages=USER, response_format=Place, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Place)
    response_of = clients.openai.responses.parse(model=MODEL, input="Hi", text_format=Place, max_output_tokens=60)
    assert isinstance(response_of.output_parsed, Place)


def openai_continues_a_turn(clients: Clients) -> None:
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    continued = clients.chat(messages=TURN, extra_body=going_on).choices[0].message.content
    assert continued != clients.chat(messages=TURN).choices[0].message.content
    assert (
        continued
        == clients.message(messages=TURN).content[0].text
        == clients.ollama_chat(messages=TURN).message.content
    )


def openai_completions_and_models(clients: Clients) -> None:
    create = clients.openai.completions.create
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0}
    both = create(**fields, prompt=["One two three", "Once upon a time"], echo=True)
    alone = [create(**fields, prompt=prompt).choices[0].text for prompt in ("One two three", "Once upon a time")]
    assert [choice.text for choice in both.choices] == [f"One two three{alone[0]}", f"Once upon a time{alone[1]}"]
    assert [model.id for model in clients.openai.models.list()] == [MODEL]
    assert clients.openai.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        clients.openai.models.retrieve("other")


def openai_responses(clients: Clients) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "temperature": 0,
        "max_output_tokens": TOKENS,
        "instructions": "Be brief.",
    }
    whole = clients.openai.responses.create(**fields, input="Describe a person.")
    with clients.openai.responses.stream(**fields, input="Describe a person.") as events:
        kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")
    assert kinds.count("response.output_text.delta") >= 2
    items: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    after = clients.openai.responses.create(**fields, input=items)
    assert whole.output_text
    assert (after.status, after.usage and after.usage.output_tokens) == ("incomplete", TOKENS)


def openai_embeddings(clients: Clients) -> None:
    create = clients.openai.embeddings.create
    packed = create(model=MODEL, input=["A cat.", "A dog."])
    floats = create(model=MODEL, input=["A cat.", "A dog."], encoding_format="float")
    for one, other in zip(packed.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-3)
    embedded = clients.ollama.embed(model=MODEL, input=["A cat.", "A dog."])
    assert list(embedded.embeddings[1]) == pytest.approx(floats.data[1].embedding, abs=1e-3)
    assert len(clients.ollama.embeddings(model=MODEL, prompt="A cat.").embedding) == len(floats.data[0].embedding)


def openai_errors(clients: Clients) -> None:
    with pytest.raises(openai.BadRequestError, match="temprature") as caught:
        clients.chat(extra_body={"temprature": 1})
    assert str(caught.value.request_id).startswith("req_")
    with pytest.raises(openai.NotFoundError):
        clients.chat(model="other")
    with pytest.raises(openai.BadRequestError) as long:
        clients.chat(messages=[{"role": "user", "content": "far too long " * 20_000}])
    assert long.value.code == "context_length_exceeded"


def prompt_tokens(usage: Any) -> int:
    """Return the tokens of a prompt, cached ones included."""
    return int(usage.input_tokens + usage.cache_read_input_tokens)


def anthropic_messages(clients: Clients) -> None:
    answer = clients.message(system="Be brief.", extra_body={"top_k": 5})
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", TOKENS)
    with clients.anthropic.messages.stream(
        model=MODEL, max_tokens=TOKENS, messages=USER, extra_body={"temperature": 0}
    ) as events:
        kinds = [event.type for event in events]
        final: Any = events.get_final_message()
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert final.content[0].text == clients.message().content[0].text
    count = clients.anthropic.messages.count_tokens(model=MODEL, messages=USER)
    assert count.input_tokens == prompt_tokens(clients.message().usage)


def anthropic_fields(clients: Clients) -> None:
    tool = {"name": "weather", "description": "The weather of a city.", "input_schema": SCHEMA}
    with pytest.raises(anthropic.BadRequestError, match="template knows no tools"):
        clients.message(tools=[tool], tool_choice={"type": "any"})
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = clients.message(max_tokens=60, extra_body={"output_config": form}, thinking={"type": "disabled"})
    assert json.loads(answer.content[0].text)["city"] in {"Oslo", "Rome"}
    whole = clients.message().content[0].text
    stop = whole.split()[1]
    stopped = clients.message(stop_sequences=[stop])
    assert (stopped.content[0].text, stopped.stop_reason) == (whole[: whole.index(stop)], "stop_sequence")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        clients.message(max_tokens=0)
    with pytest.raises(anthropic.NotFoundError):
        clients.message(model="other")


def ollama_chat(clients: Clients) -> None:
    whole = clients.ollama_chat(keep_alive="5m")
    assert (whole.done_reason, whole.eval_count) == ("length", TOKENS)
    assert whole.message.content == clients.chat().choices[0].message.content
    parts = list(clients.ollama_chat(stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    scored = clients.ollama_chat(logprobs=True, top_logprobs=2)
    assert len(scored.logprobs) == TOKENS
    formed = clients.ollama_chat(format=SCHEMA, options={"num_predict": 60})
    assert json.loads(formed.message.content)["city"] in {"Oslo", "Rome"}
    window = clients.ollama_chat(options={"repeat_penalty": 1.5, "repeat_last_n": 16})
    assert window.eval_count == TOKENS


def ollama_generate(clients: Clients) -> None:
    options = {"num_predict": TOKENS, "temperature": 0}
    raw = clients.ollama.generate(model=MODEL, prompt="Once upon a time", raw=True, options=options)
    completion = clients.openai.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=TOKENS, temperature=0
    )
    assert raw.response == completion.choices[0].text
    parts = list(clients.ollama.generate(model=MODEL, prompt="Hi", system="Be brief.", options=options, stream=True))
    assert parts[-1].eval_count == TOKENS
    assert clients.ollama.generate(model=MODEL).done_reason == "load"


def ollama_models(clients: Clients) -> None:
    (listed,) = clients.ollama.list().models
    (running,) = clients.ollama.ps().models
    shown = clients.ollama.show(MODEL)
    assert (listed.model, running.model) == (MODEL, MODEL)
    assert (shown.modelinfo or {})["metaswarm.block_count"] == 30
    assert "completion" in (shown.capabilities or ())
    assert "messages" in (shown.template or "")
    with pytest.raises(ollama.ResponseError, match="mirostat"):
        clients.ollama_chat(options={"mirostat": 2})
    with pytest.raises(ollama.ResponseError) as caught:
        clients.ollama.show("other")
    assert caught.value.status_code == 404


FEATURES: Final[tuple[Callable[[Clients], None], ...]] = (
    openai_chat,
    openai_stream,
    openai_asynchronous,
    openai_sampling,
    openai_tools,
    openai_structured,
    openai_continues_a_turn,
    openai_completions_and_models,
    openai_responses,
    openai_embeddings,
    openai_errors,
    anthropic_messages,
    anthropic_fields,
    ollama_chat,
    ollama_generate,
    ollama_models,
)


def failures(url: str) -> dict[str, str]:
    """Try every feature; return what failed, by name."""
    found: dict[str, str] = {}
    with Clients.of(url) as clients:
        for feature in FEATURES:
            try:
                feature(clients)
            except Exception as error:  # noqa: BLE001  # every feature is tried
                found[feature.__name__] = repr(error)[:500]
    return found
