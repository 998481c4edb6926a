import json

import pytest
from tokenizers import Tokenizer as Trained

from node.models.errors import ModelError
from node.models.manifest import Json
from node.models.tokenizer_worker import Tokenizer
from tests.unit.models.vocabularies import byte_fallback, byte_level, metaspace


def test_stop_tokens_are_what_manifest_config_and_template_say() -> None:
    definition = byte_level()
    config: dict[str, Json] = {"eos_token": {"content": "<s>", "__type": "AddedToken"}}
    tokenizer = Tokenizer(definition, config, "{{ messages[0].content }}<|end|>", [5])
    assert tokenizer.stop_tokens == (0, 1, 5)
    assert tokenizer.special_tokens == {"eos_token": "<s>"}
    assert Tokenizer(definition, {"eos_token": "unknown"}, None, []).stop_tokens == ()


def test_end_of_a_harmony_message_ends_no_turn() -> None:
    trained = Trained.from_str(byte_level())
    trained.add_special_tokens(["<|return|>", "<|call|>", "<|channel|>", "<|message|>"])
    ids = trained.get_vocab()
    end, returned, called = (ids[text] for text in ("<|end|>", "<|return|>", "<|call|>"))
    template = (
        "{% if tools %}namespace functions{% endif %}{% for m in messages %}<|start|>assistant<|channel|>final"
        "<|message|>{{ m.content }}<|end|>{% endfor %}"
    )
    tokenizer = Tokenizer(trained.to_str(), {"eos_token": "<|return|>"}, template, [end, returned])
    assert tokenizer.stop_tokens == tuple(sorted((returned, called))), "else the answer behind the analysis never comes"
    assert {"<|channel|>", "<|message|>", "<|end|>"} <= set(tokenizer.marks.values())
    assert (tokenizer.tool_format, tokenizer.reasons) == ("harmony", True)
    assert "<|end|>" not in Tokenizer(trained.to_str(), {}, "<|end|>").marks.values()


def test_a_conversation_becomes_the_templates_tokens_and_no_more() -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    tokenizer = Tokenizer(byte_level(), {"bos_token": "<s>"}, template)
    assert tokenizer.has_chat_template
    messages = [{"role": "user", "content": "fox"}]
    text = tokenizer.render_chat_text(messages)
    assert text == "<s>[user]fox<|end|>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert (tokens[0], tokens[-1]) == (1, 0)
    assert tokenizer.decode(tokens) == "[user]fox"
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(byte_level()).render_chat_text(messages)


@pytest.mark.parametrize("definition", ["", "{}", "[]", '{"model": {"type": "BPE"}}', "\x00", "[" * 10000])
def test_a_broken_tokenizer_is_one_clear_line(definition: str) -> None:
    with pytest.raises(ModelError, match="the model's tokenizer is broken") as error:
        Tokenizer(definition)
    assert "\n" not in str(error.value)


def test_broken_template_does_not_affect_plain_prompts() -> None:
    tokenizer = Tokenizer(byte_level(), {}, "{% for %}")
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"
    with pytest.raises(ValueError, match="chat template is broken"):
        tokenizer.render_chat_text([{"role": "user", "content": "fox"}])


def test_a_token_that_is_too_long_is_refused() -> None:
    definition = json.loads(byte_level())
    definition["added_tokens"][-1]["content"] = "x" * 5000
    with pytest.raises(ModelError, match=r"token \d+ of the model has 5000 bytes"):
        Tokenizer(json.dumps(definition)).vocabulary()


@pytest.mark.parametrize(
    ("template", "tool_format", "reasons"),
    [
        ("{{ messages }}", None, False),
        ("{% if tools %}<tool_call>{% endif %}<think>", "hermes", True),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral", False),
        ("""{% if tools %}{"name": 1, "parameters": 2}{% endif %}""", "llama3", False),
        ("{% if tools %}in another way{% endif %}", None, False),
    ],
)
def test_template_tells_how_the_model_writes(template: str, tool_format: str | None, reasons: bool) -> None:
    tokenizer = Tokenizer(byte_level(), {}, template)
    assert (tokenizer.tool_format, tokenizer.reasons) == (tool_format, reasons)


def test_reasoning_is_known_by_its_tokens() -> None:
    trained = Trained.from_str(byte_level())
    assert Tokenizer(trained.to_str(), {}, "<think>").reasoning_tokens is None, "its marks are several tokens"
    trained.add_tokens(["<think>", "</think>"])
    marks = trained.token_to_id("<think>"), trained.token_to_id("</think>")
    assert Tokenizer(trained.to_str(), {}, "<think>").reasoning_tokens == marks
    assert Tokenizer(trained.to_str(), {}, "plain").reasoning_tokens is None


def test_template_gets_tools_and_options() -> None:
    template = "{{ tools | tojson }} {{ enable_thinking }} {{ messages[0].tool_calls[0].function.arguments.x }}"
    turns = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 7}}}]}]
    tokenizer = Tokenizer(byte_level(), {}, template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = tokenizer.render_chat_text(turns, tools, {"enable_thinking": False, "messages": "forged"})
    assert text == f"{json.dumps(tools)} False 7"
    assert tokenizer.render_chat_text(turns).startswith("null")


def test_special_tokens_that_mark_something_are_known() -> None:
    definition = json.loads(byte_level())
    definition["added_tokens"][-1] |= {"content": "[TOOL_CALLS]", "special": True}
    token = definition["added_tokens"][-1]["id"]
    assert Tokenizer(json.dumps(definition)).marks == {token: "[TOOL_CALLS]"}


@pytest.mark.parametrize("definition", [byte_level(), byte_fallback(), metaspace()])
def test_tokens_are_spelt_one_by_one(definition: str) -> None:
    tokenizer = Tokenizer(definition)
    tokens = tokenizer.encode("a fox ¶", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode().strip() == "a fox ¶"
    assert tokenizer.token_bytes(1 << 20) == b""
    (special, *_) = (token for token in json.loads(definition)["added_tokens"] if token["special"])
    assert tokenizer.token_bytes(special["id"]) == special["content"].encode()
