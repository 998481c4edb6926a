"""Tokenizers and chat templates in processes with limits: hostile ones cost their own request, and nobody else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
import trio.testing

from node.models import tokenizer_service
from node.models.errors import ChatTemplateError, ModelError, TokenizerBusyError, TokenizerUnavailableError
from node.models.streaming import StreamDecoder
from node.models.tokenizer_process import COMMAND
from node.models.tokenizer_service import Limits, TokenizerService
from tests.support import hostile_directory
from tests.support.tokenizers import load_tokenizer
from tests.unit.models.packages import write_package
from tests.unit.models.vocabularies import byte_fallback, byte_level, metaspace

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
TURNS = [{"role": "user", "content": "fox"}]
LIMITS = Limits(render_s=0.4, encode_s=0.6, decode_s=0.4, load_s=20.0, wall_factor=20.0, work_bytes=128 << 20)


@asynccontextmanager
async def service(**options: Any) -> AsyncIterator[TokenizerService]:
    """Run a service; at the end none of its processes is left."""
    service = TokenizerService(**{"limits": LIMITS, **options})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        with trio.fail_after(100):
            yield service
        nursery.cancel_scope.cancel()
    assert not [child for child in psutil.Process().children() if "tokenizer_worker" in " ".join(child.cmdline())]


def repeat(body: str, start: str = "'x'") -> str:
    return (
        ("{% set n = namespace(x=START) %}{% for a in range(60) %}{% set n.x = BODY %}{% endfor %}{{ n.x | length }}")
        .replace("START", start)
        .replace("BODY", body)
    )


NESTED = (
    "{% set n = namespace(x=[1], y=[1]) %}"
    "{% for a in range(40) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
)

HOSTILE_TEMPLATES = {
    "endless loop": "{% for a in range(9999) %}" * 4 + "{% endfor %}" * 4,
    "endless loop while it is compiled": "{{ 9 ** (9 ** 9) }}",
    "comparison of nested lists": NESTED + "{{ n.x == n.y }}",
    "nested list as text": NESTED + "{{ n.x }}",
    "nested list as JSON": NESTED + "{{ n.x | tojson }}",
    "doubling a text": repeat("n.x ~ n.x"),
    "doubling a list": repeat("n.x + n.x", start="[1]"),
    "squaring a number": repeat("n.x * n.x", start="9"),
    "multiplied text": "{{ 'x' * 99999999999 }}",
    "multiplied list": "{% set x = [1] * 99999999999 %}",
    "bytes": "{% set x = 'x'.encode() * 99999999999 %}",
    "replace": "{% set x = 'x' * 99999 %}{{ x | replace('x', x) }}",
    "indent": "{{ 'x\nx' | indent(9999999999) }}",
    "indented JSON": "{{ messages | tojson(indent=9999999999) }}",
    "pad": "{{ 'x'.ljust(9999999999) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "format method": "{{ '{:>9999999999}'.format(1) }}",
    "batch": "{{ [1] | batch(9999999999, 'x') | list }}",
    "word wrap": "{{ ('x ' * 9999999) | wordwrap(1) | wordwrap(1) | length }}",
    "sorting": "{% for a in range(9999) %}{% set x = range(99999) | sort %}{% endfor %}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "deep template": "{{ " + "-" * 200_000 + "1 }}",
    "slow regular expression": "{% for a in range(999) %}{{ ('a@' * 50000) | urlize }}{% endfor %}",
}


@pytest.mark.parametrize("source", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES)
async def test_hostile_chat_template_fails_only_its_own_request(source: str, tmp_path: Path) -> None:
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_level(), source))
        with trio.fail_after(15), pytest.raises(ChatTemplateError) as caught:
            await tokenizer.render_chat(TURNS)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("the model's chat template ")
        assert len(str(caught.value)) < 500
        assert await tokenizer.decode(await tokenizer.encode("fox")) == ["fox"]


async def test_template_timeout_names_its_limit(tmp_path: Path) -> None:
    async with service() as tokenizers:
        source = HOSTILE_TEMPLATES["endless loop"]
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_level(), source))
        with pytest.raises(ChatTemplateError, match=r"^the model's chat template took longer than 0\.4 s$"):
            await tokenizer.render_chat(TURNS)


async def test_text_of_the_template_is_known(tmp_path: Path) -> None:
    async with service() as tokenizers:
        for name, template in (("with", TEMPLATE), ("without", None)):
            tokenizer = await tokenizers.open(write_package(tmp_path / name, byte_level(), template))
            assert tokenizer.chat_template == (template or "")


def changed(change: Callable[[dict[str, Any]], object], definition: str) -> str:
    """Return a tokenizer.json with a change."""
    values = json.loads(definition)
    change(values)
    return json.dumps(values)


def doubling(definition: dict[str, Any]) -> None:
    one = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}
    definition["normalizer"] = {"type": "Sequence", "normalizers": [one] * 60}


def backtracking(definition: dict[str, Any]) -> None:
    pattern = {"Regex": "(x+x+)+y"}
    definition["normalizer"] = {"type": "Replace", "pattern": pattern, "content": ""}


def slow_decoder(definition: dict[str, Any]) -> None:
    one = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}
    definition["decoder"] = {"type": "Sequence", "decoders": [one] * 60}


def long_decoder(definition: dict[str, Any]) -> None:
    one = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 2_000_000}
    definition["decoder"] = {"type": "Sequence", "decoders": [one]}


def prepending(definition: dict[str, Any]) -> None:
    one = {"type": "Prepend", "prepend": "x" * 100_000}
    definition["normalizer"] = {"type": "Sequence", "normalizers": [one] * 20}


HOSTILE_TOKENIZERS = {
    "doubling normalizers": (doubling, byte_level),
    "backtracking regular expression": (backtracking, byte_level),
    "prepending normalizers": (prepending, byte_level),
    "doubling decoders": (slow_decoder, byte_fallback),
    "a decoder that makes much of little": (long_decoder, byte_fallback),
}


@pytest.mark.parametrize("kind", HOSTILE_TOKENIZERS)
async def test_hostile_tokenizer_fails_only_its_own_request(kind: str, tmp_path: Path) -> None:
    change, vocabulary = HOSTILE_TOKENIZERS[kind]
    hostile = write_package(tmp_path / "hostile", changed(change, vocabulary()))
    async with service() as tokenizers:
        honest = await tokenizers.open(write_package(tmp_path / "honest", byte_level(), TEMPLATE))

        async def use() -> None:
            tokenizer = await tokenizers.open(hostile)
            await tokenizer.decode(await tokenizer.encode("x" * 40))

        with trio.fail_after(15), pytest.raises(ModelError) as caught:
            await use()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        assert await honest.decode(await honest.render_chat(TURNS)) == ["[user]fox"]


HOSTILE_FILES = {
    "nothing": "",
    "no JSON": "\x00",
    "deep": "[" * 100_000,
    "a token that is a novel": changed(
        lambda values: values["added_tokens"][-1].update(content="x" * 5000), byte_level()
    ),
    "a regular expression that is none": changed(
        lambda values: values.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(((((((("}, "behavior": "Isolated", "invert": False}
        ),
        byte_level(),
    ),
}


@pytest.mark.parametrize("definition", HOSTILE_FILES.values(), ids=HOSTILE_FILES)
async def test_a_broken_tokenizer_is_one_clear_line(definition: str, tmp_path: Path) -> None:
    async with service() as tokenizers:
        with pytest.raises(ModelError, match=r"^model [0-9a-f]{12}: ") as caught:
            await tokenizers.open(write_package(tmp_path, definition))
        assert "\n" not in str(caught.value)


async def test_a_tokenizer_that_needs_more_memory_than_it_may_is_refused(tmp_path: Path) -> None:
    limits = Limits(load_bytes=8 << 20, load_bytes_per_byte=1)
    async with service(limits=limits) as tokenizers:
        with pytest.raises(ModelError, match=r"memory|failed"):
            await tokenizers.open(write_package(tmp_path, byte_level()))


@pytest.mark.parametrize("vocabulary", [byte_level, byte_fallback, metaspace])
async def test_tokenizer_process_equals_in_process_tokenizer(vocabulary: Callable[[], str], tmp_path: Path) -> None:
    package = write_package(tmp_path, vocabulary(), TEMPLATE)
    here = load_tokenizer(package)
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(package)
        text = "Grüße, 日本語 🎉 fox\n"
        assert list(await tokenizer.encode(text)) == here.encode(text)
        assert list(await tokenizer.encode(text, add_special_tokens=False)) == here.encode(
            text, add_special_tokens=False
        )
        tokens = await tokenizer.encode(text)
        assert await tokenizer.decode(tokens, tokens[:2]) == [here.decode(tokens), here.decode(tokens[:2])]
        assert list(await tokenizer.render_chat(TURNS)) == here.encode(
            here.render_chat_text(TURNS), add_special_tokens=False
        )
        assert tokenizer.stop_tokens == here.stop_tokens
        decoder = StreamDecoder(tokenizer)
        pieces = [await decoder.feed(token) for token in (*tokens, 10**6)]
        assert "".join([*pieces, decoder.finish()]) == here.decode(tokens)


async def test_streams_survive_a_hanging_template(tmp_path: Path) -> None:
    """Text streams on over a process that is killed again and again, and comes out as if nothing had happened."""
    source = "{% if messages[0].content == 'hang' %}" + HOSTILE_TEMPLATES["endless loop"] + "{% endif %}" + TEMPLATE
    text = "The quick brown fox jumps over the lazy dog. 🎉 " * 3
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_fallback(), source))
        tokens = await tokenizer.encode(text)
        first = tokenizers.pids()
        texts: list[str] = []
        refused = 0

        async def stream() -> None:
            decoder = StreamDecoder(tokenizer)
            pieces = [await decoder.feed(token) for token in tokens]
            texts.append("".join([*pieces, decoder.finish()]))

        async def hang() -> None:
            nonlocal refused
            with pytest.raises(ChatTemplateError, match="took longer than"):
                await tokenizer.render_chat([{"role": "user", "content": "hang"}])
            refused += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stream)
                nursery.start_soon(hang)
        assert texts == [text] * 3
        assert refused == 3
        assert tokenizers.pids() != first


async def test_request_is_retried_after_its_process_is_killed(tmp_path: Path) -> None:
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_level()))
        tokens = await tokenizer.encode("fox")
        for _ in range(3):
            os.kill(tokenizers.pids()[0], signal.SIGKILL)
            assert await tokenizer.encode("fox") == tokens


async def test_request_fails_after_two_crashed_processes(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    program = f"import os; open({str(starts)!r}, 'a').write('x'); os.write(2, b'no memory'); os.abort()"
    async with service(command=[sys.executable, "-c", program]) as tokenizers:
        with pytest.raises(ModelError, match=r"tokenizer failed: its process was killed by SIGABRT: no memory$"):
            await tokenizers.open(write_package(tmp_path / "model", byte_level()))
    assert starts.read_text() == "xx"


async def test_hung_tokenizer_does_not_block_another_model(tmp_path: Path) -> None:
    hung = write_package(tmp_path / "hung", byte_level(), HOSTILE_TEMPLATES["endless loop"])
    async with service(limits=Limits(render_s=60)) as tokenizers, trio.open_nursery() as nursery:
        tokenizer = await tokenizers.open(hung)
        nursery.start_soon(tokenizer.render_chat, TURNS)
        other = await tokenizers.open(write_package(tmp_path / "other", byte_level(), TEMPLATE))
        assert await other.render_chat(TURNS)
        nursery.cancel_scope.cancel()  # passes at once


async def test_tokenizer_processes_are_bounded_and_end_when_idle(tmp_path: Path) -> None:
    async with service(max_processes=2) as tokenizers:
        opened = [
            await tokenizers.open(write_package(tmp_path / str(number), byte_level(), eos=number))
            for number in range(4)
        ]
        assert len(tokenizers.pids()) == 2
        async with trio.open_nursery() as nursery:
            for tokenizer in opened * 3:
                nursery.start_soon(tokenizer.encode, "fox")
        assert len(tokenizers.pids()) <= 2
        tokenizers.idle_s = 0.01
        await opened[0].encode("fox")
        await opened[1].encode("fox")
        with trio.fail_after(20):
            while tokenizers.pids():
                await trio.testing.wait_all_tasks_blocked(0.02)
        tokenizers.idle_s = 60
        assert await opened[3].encode("fox")


async def test_steady_load_on_one_model_does_not_starve_another(tmp_path: Path) -> None:
    async with service(max_processes=1) as tokenizers, trio.open_nursery() as nursery:
        busy, other = [
            await tokenizers.open(write_package(tmp_path / str(number), byte_level(), eos=number))
            for number in range(2)
        ]

        async def load() -> None:
            while True:
                await busy.encode("fox")

        for _ in range(3):  # so that it is never idle
            nursery.start_soon(load)
        with trio.fail_after(30):
            assert await other.encode("fox")
        nursery.cancel_scope.cancel()


async def test_unstartable_process_is_reported_as_unavailable(tmp_path: Path) -> None:
    async with service(command=("/nonexistent",)) as tokenizers:
        with pytest.raises(ModelError, match="cannot be started"):
            await tokenizers.open(write_package(tmp_path, byte_level()))
    async with service(max_processes=1) as tokenizers:
        tokenizer = await tokenizers.open(write_package(tmp_path / "model", byte_level()))
        await (await tokenizers.open(write_package(tmp_path / "other", byte_level(), eos=1))).encode("fox")
        tokenizers.command = ("/nonexistent",)
        with pytest.raises(TokenizerUnavailableError, match="cannot be started"):
            await tokenizer.encode("fox")


async def test_request_queue_is_bounded_and_skips_cancelled_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_service, "MAX_WAITING", 2)
    async with service(limits=Limits(render_s=60)) as tokenizers:
        hang = "{% if messages[0].content == 'hang' %}" + HOSTILE_TEMPLATES["endless loop"] + "{% endif %}"
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_level(), hang))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tokenizer.render_chat, [{"role": "user", "content": "hang"}])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(tokenizer.encode, "fox")
            nursery.start_soon(tokenizer.encode, "fox")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(TokenizerBusyError, match="2 requests wait"):
                await tokenizer.encode("fox")
            nursery.cancel_scope.cancel()


async def test_prompts_of_one_asker_do_not_keep_those_of_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_service, "MAX_WAITING", 3)
    order: list[str] = []
    async with service(limits=Limits(render_s=0.5)) as tokenizers:
        template = HOSTILE_TEMPLATES["endless loop"]
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_level(), template))

        async def hang() -> None:
            with suppress(ChatTemplateError):
                await tokenizer.asked_by("many").render_chat(TURNS)

        async def encode(asker: str, text: str) -> None:
            await tokenizer.asked_by(asker).encode(text)
            order.append(asker)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang)
            await trio.testing.wait_all_tasks_blocked()
            for asker, text in (("many", "fox " * 500),) * 3 + (("one", "fox"), ("other", "fox"), ("one", "fox")):
                nursery.start_soon(encode, asker, text)
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(TokenizerBusyError, match="3 requests wait"):
                await tokenizer.asked_by("many").encode("fox")
    assert order == ["one", "other", "one", "many", "many", "many"]


async def test_a_model_without_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(write_package(tmp_path, None, eos=7))
        assert tokenizer.stop_tokens == (7,)
        decoder = StreamDecoder(tokenizer)
        assert await decoder.feed(5) + decoder.finish() == ""
        for refused in (partial(tokenizer.encode, "fox"), partial(tokenizer.render_chat, TURNS)):
            with pytest.raises(ModelError, match="the model has no tokenizer: give it token ids"):
                await refused()
        assert not tokenizers.pids()


UNPACKABLE: Any = ["\ud800", 10**20, -(10**20), {"\ud800": 1}, {"deep": [{"deeper": "x\udfff"}]}]


@pytest.mark.parametrize("value", UNPACKABLE, ids=ascii)
async def test_what_the_process_cannot_be_told_costs_its_own_request(value: Any, tmp_path: Path) -> None:
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_level(), TEMPLATE))
        for refused in (
            partial(tokenizer.render_chat_text, TURNS, (), {"a": value}),
            partial(tokenizer.render_chat_text, TURNS, [{"parameters": value}]),
            partial(tokenizer.render_chat_text, [{"role": "assistant", "content": "", "tool_calls": [value]}]),
            partial(tokenizer.schema_fault, '{"const": "\ud800"}'),
        ):
            with pytest.raises(ModelError, match="cannot take this input"):
                await refused()
        assert await tokenizer.decode(await tokenizer.encode("fox")) == ["fox"]


async def test_an_answer_that_is_no_map_costs_its_own_request(tmp_path: Path) -> None:
    program = "import sys; sys.stdin.buffer.read(1); sys.stdout.buffer.write(bytes([1])); sys.stdout.flush(); input()"
    package = write_package(tmp_path, byte_level())
    async with service(command=[sys.executable, "-c", program]) as tokenizers:
        with pytest.raises(ModelError, match="the model's tokenizer failed"):
            await tokenizers.open(package)
        tokenizers.command = COMMAND
        assert await (await tokenizers.open(package)).encode("fox")


async def test_tokenizer_process_is_isolated_from_environment_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    package = write_package(tmp_path / "model", byte_level(), TEMPLATE)
    (tmp_path / "here").mkdir()
    mark = hostile_directory.fill(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(package)
        assert await tokenizer.render_chat(TURNS)
        process = psutil.Process(tokenizers.pids()[0])
        assert "HF_TOKEN" not in process.environ()
        loaded = {Path(file.path).name for file in process.memory_maps()}
        assert not [name for name in loaded if "torch" in name]
    assert not mark.exists()


async def test_streaming_a_byte_level_vocabulary_needs_no_process(tmp_path: Path) -> None:
    async with service() as tokenizers:
        tokenizer = await tokenizers.open(write_package(tmp_path, byte_level()))
        text = "The quick brown fox " * 50
        tokens = await tokenizer.encode(text)
        with trio.CancelScope() as scope:
            scope.cancel()  # asking the process would end here
            decoder = StreamDecoder(tokenizer)
            pieces = [await decoder.feed(token) for token in tokens]
        assert "".join([*pieces, decoder.finish()]) == text


def test_the_daemon_does_not_even_import_what_interprets_models() -> None:
    program = "import sys, node.app; print([name for name in ('tokenizers', 'jinja2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
