import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from node.models.chat_template import ChatTemplate
from node.models.errors import ChatTemplateError

TURNS = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "  What's 2+2?\n\n"},
    {"role": "assistant", "content": "Four — “4”."},
    {"role": "user", "content": "日本語で? 🎉"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# One habit of real templates each.
TEMPLATES = {
    "concatenation": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{% endfor %}",
    "attributes and tilde": "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ loop.index ~ '\n' }}{% endfor %}",
    "blocks on lines of their own": """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
  [{{ message.role | upper }}] {{ message.content.strip() }}
{% endfor %}
{%- if add_generation_prompt %}[ASSISTANT]{% endif %}
""",
    "namespace and reverse": """
{%- set ns = namespace(last=none, count=0) %}
{%- for m in messages[::-1] %}{% if m.role == 'user' and not ns.last %}{% set ns.last = m.content %}{% endif %}
{%- set ns.count = ns.count + 1 %}{% endfor %}{{ ns.last }}{{ ns.count }}""",
    "macro and filters": """
{%- macro show(m, open='<') -%}
    {{ open }}{{ m.role | capitalize }}{{ caller() if caller is defined else '' }}>
{%- endmacro %}
{%- for m in messages if m.role != 'system' %}{{ show(m) }}{{ m.content | replace('2', 'two') | length }}{% endfor %}
{{- messages | map(attribute='role') | unique | join(', ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}""",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ 'é<' | tojson }}{{ tools is none }}",
    "loop controls and tests": """
{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}
{%- if m.role not in ['system'] %}{% continue %}{% endif %}
{{- m.content is string and m.content is not mapping }}{{ 'x' if m.tool_calls is defined else 'y' }}{% endfor %}""",
    "generation mark": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "text methods": """
{%- for m in messages %}{{ m.content.split(' ')[0] }}{{ m.content.startswith('B') }}{{ m['content'].replace('B', 'b') }}
{{- ' '.join(['a', 'b']) }}{{ '%s-%02d' % (m.role, loop.index) }}{{ 'ab' * 3 }}{{ m.items() | list | length }}
{%- endfor %}""",
    "undefined": "{{ nothing }}{{ bos_token }}{% if documents %}no{% endif %}{{ unk_token }}",
    "date": "{{ strftime_now('%Y') }}",
    "indented blocks": "{{ 'a\\nb' | indent(4) }}{{ '{:>5}'.format('x') }}{{ 'x'.ljust(3) }}{{ '%5s' | format('y') }}",
    "nested lists": "{% for a in [[1, [2]], []] recursive %}({{ loop(a) if a is iterable else a }}){% endfor %}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(source: str) -> None:
    options: dict[str, Any] = {"chat_template": source, "add_generation_prompt": True, **SPECIAL}
    expected = render_jinja_template([TURNS], **options)[0][0]
    assert ChatTemplate(source).render(TURNS, SPECIAL) == expected


def test_a_template_may_refuse_a_conversation_in_its_own_words() -> None:
    template = ChatTemplate("{% if messages | length < 2 %}{{ raise_exception('too\n short') }}{% endif %}")
    with pytest.raises(ChatTemplateError, match="these messages: too short"):
        template.render(TURNS[:1], {})
    assert template.render(TURNS, {}) == ""


ALTERNATES = """
{%- set ns = namespace(count=0) %}
{%- for m in messages if m.role != 'tool' and not m.tool_calls %}
  {%- if (m.role == 'user') != (ns.count % 2 == 0) %}
    {{- raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
  {%- set ns.count = ns.count + 1 %}{% endfor %}"""
NINE = """
{%- for m in messages %}{% for id in m.tool_calls | map(attribute='id') | list or [m.tool_call_id or 'nothing..'] %}
  {%- if id | length != 9 %}
    {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{%- endfor %}{% endfor %}"""
SINGLE = """
{%- for m in messages if m.tool_calls | length > 1 %}
  {{- raise_exception('This model only supports single tool-calls at once!') }}{% endfor %}"""
SHOWN = "{{ messages | tojson }}"


def shown(source: str, *turns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the conversation that a template renders."""
    return list(json.loads(ChatTemplate(source + SHOWN).render(turns, {})))


def calling(*ids: str, **fields: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": id_} for id_ in ids], **fields}


def result(content: str, **fields: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, **fields}


ASKED, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_strict_template_gets_alternating_turns() -> None:
    turns = (ASKED, ASKED, SAID, SAID, ASKED, calling("c1"), result("1"), result("2"), ASKED)
    assert shown(ALTERNATES, *turns) == [
        ASKED | {"content": "a\n\na"}, SAID | {"content": "b\n\nb"}, ASKED, calling("c1"), result("1"),
        result("2\n\na"),
    ]  # fmt: skip
    assert shown("", *turns) == list(turns), "as they are, where the template takes them"


def test_strict_template_gets_turns_of_the_system_at_the_beginning_only() -> None:
    told, alternates = {"role": "system", "content": "s"}, ALTERNATES.replace("!= 'tool'", "not in ('tool', 'system')")
    ordered = """{%- for m in messages %}{% if m.role == 'system' and not loop.first %}
      {{- raise_exception('System message must be at the beginning.') }}{% endif %}{% endfor %}"""
    for source in (ordered, alternates + ordered):
        assert shown(source, told, told, ASKED) == [told | {"content": "s\n\ns"}, ASKED]
        assert shown(source, ASKED, told, ASKED) == [ASKED | {"content": "a\n\ns\n\na"}]
        assert shown(source, told, ASKED, SAID, told) == [told, ASKED, SAID, ASKED | {"content": "s"}]


def test_joined_turns_keep_all_reasoning() -> None:
    first, second = SAID | {"reasoning_content": "x"}, SAID | {"content": "", "reasoning_content": "y"}
    assert shown(ALTERNATES, ASKED, first, second) == [ASKED, SAID | {"reasoning_content": "x\n\ny"}]
    assert shown(ALTERNATES, ASKED, SAID, second) == [ASKED, SAID | {"reasoning_content": "y"}]


def test_strict_template_gets_ids_of_nine_characters() -> None:
    turns = (
        calling("call_one", "abcdeFGH9"), result("2", tool_call_id="abcdeFGH9"), result("1", tool_call_id="call_one"),
        calling("", ""), result("3"), result("4"), calling(""), result("5"), result("of none"),
    )  # fmt: skip
    seen = shown(NINE, *turns)
    ids = [[call["id"] for call in turn.get("tool_calls", ())] or turn["tool_call_id"] for turn in seen]
    assert ids[0] == [ids[2], "abcdeFGH9"]
    assert (ids[1], ids[3], ids[6]) == ("abcdeFGH9", [ids[4], ids[5]], [ids[7]])
    assert len({ids[2], ids[4], ids[5], ids[7], ids[8]}) == 5
    assert shown(NINE, *turns[:5]) == seen[:5], "the same again when the conversation has gone on"


def test_strict_template_gets_one_call_a_turn() -> None:
    both = calling("c1", "c2", "c3", content="Wait.", reasoning_content="hm")
    first = calling("c1", content="Wait.", reasoning_content="hm")
    named = [result("2", tool_call_id="c2"), result("1", tool_call_id="c1")]
    assert shown(SINGLE, ASKED, both, *named, SAID) == [
        ASKED, first, named[1], calling("c2"), named[0], calling("c3"), SAID
    ]  # fmt: skip
    unnamed = [result(text) for text in "1234"]
    assert shown(SINGLE, both, *unnamed) == [
        first, unnamed[0], calling("c2"), unnamed[1], calling("c3"), unnamed[2], unnamed[3]
    ]  # fmt: skip


def test_results_without_ids_are_those_of_the_calls_of_their_tool() -> None:
    """As Ollama's clients send them, in any order; only what names no tool that was called is that of the next call."""
    names = ("weather", "time", "weather", "date")
    calls = [{"id": "", "function": {"name": name, "arguments": {}}} for name in names]
    turns = (
        {"role": "assistant", "content": "", "tool_calls": calls},
        result("12:00", name="time"), result("snow", name="weather"), result("rain", name="weather"), result("Monday"),
    )  # fmt: skip
    asked, *answers = shown(NINE, *turns)
    ids = [call["id"] for call in asked["tool_calls"]]
    expected = ["snow", "12:00", "rain", "Monday"]
    assert dict(zip(ids, expected, strict=True)) == {turn["tool_call_id"]: turn["content"] for turn in answers}
    one_each = shown(SINGLE, *turns)
    assert [turn["tool_calls"][0]["function"]["name"] for turn in one_each[::2]] == list(names)
    assert [turn["content"] for turn in one_each[1::2]] == expected


def test_strict_template_gets_all_that_it_asks_for() -> None:
    turns = (ASKED, calling("call_one", "call_two"), result("1"), result("2"), ASKED)
    seen = shown(ALTERNATES + NINE + SINGLE, *turns)
    assert [turn["role"] for turn in seen] == ["user", "assistant", "tool", "assistant", "tool"]
    assert seen[2]["tool_call_id"] == seen[1]["tool_calls"][0]["id"] != seen[3]["tool_calls"][0]["id"]
    assert seen[4]["content"] == "2\n\na"
    with pytest.raises(ChatTemplateError, match="must alternate"):
        shown(ALTERNATES, SAID, ASKED)


REFUSED = {
    "huge range": "{{ range(999999999) | list }}",
    "long output": "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "escape by subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape by attr": "{{ ('' | attr('__class__')).__mro__[1] }}",
    "escape by format": "{{ '{0.__class__.__mro__[1]}'.format(1) }}",
    "escape by self": "{{ self.__init__.__globals__ }}",
    "changing the messages": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% for %}",
    "unknown filter": "{{ 1 | nonsense }}",
    "division": "{{ 1 / 0 }}",
    "type": "{{ messages + 1 }}",
    "half a character": "{{ '\\ud800' }}",
    "deep template": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_a_template_that_cannot_be_rendered_is_one_clear_line(source: str) -> None:
    with pytest.raises(ChatTemplateError) as error:
        ChatTemplate(source).render(TURNS, SPECIAL)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_what_is_internal_to_python_is_undefined() -> None:
    for source in ("{{ raise_exception.__globals__ }}", "{{ ''.__class__ }}", "{{ namespace.__init__ }}"):
        assert ChatTemplate(source).render(TURNS, SPECIAL) == ""


def test_a_long_conversation_fits() -> None:
    source = TEMPLATES["blocks on lines of their own"] + "{% for m in messages %}{{ messages | length }}{% endfor %}"
    turns = [{"role": "system", "content": "x"}]
    turns += [{"role": role, "content": "word " * 1000} for _ in range(250) for role in ("user", "assistant")]
    assert len(ChatTemplate(source).render(turns, SPECIAL)) > 2_500_000
