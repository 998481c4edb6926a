"""Texts that follow a JSON Schema, with the real library in its process."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import psutil
import pytest
import tokenizers

from node.engine import constraint_worker
from node.engine.constraint import ConstraintProcess
from node.engine.interface import BadRequest, EngineError
from node.engine.sampling import draw_and_verify, history_for
from node.models.json_schema import schema_fault
from node.testing.fake_engine import UNSATISFIABLE
from protocol.messages import Sampling
from tests.support import hostile_directory
from tests.unit.models.vocabularies import byte_level

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"word": {"enum": ["fox", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["word", "count"],
        "additionalProperties": False,
    }
)
VOCABULARY = 500
STOP = 0
PROMPT = (40, 41, 42)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ConstraintProcess]:
    file = tmp_path / "tokenizer.json"
    file.write_text(byte_level())
    process = ConstraintProcess(file, VOCABULARY)
    yield process
    process.close()


def sampling(**fields: Any) -> Sampling:
    defaults = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "stop_tokens": (STOP,), "json_schema": SCHEMA}
    return Sampling(**{**defaults, "prompt_length": len(PROMPT), **fields})


def logits(position: int) -> Any:
    """Return what a model would say that knows nothing of JSON."""
    return np.random.default_rng(position).normal(size=VOCABULARY).astype(np.float32)


def generate(process: ConstraintProcess, sampling: Sampling, *, given: Sequence[int] = ()) -> list[int]:
    """Return the tokens of a text, drawn one by one; `given` were drawn elsewhere."""
    history = history_for(sampling)
    assert history is not None
    history.reset([*PROMPT, *given])
    constraint = process.open(sampling.json_schema)
    tokens = list(given)
    while STOP not in tokens and len(tokens) < sampling.max_tokens:
        position = len(PROMPT) + len(tokens)
        tokens += draw_and_verify([logits(position)], sampling, position, (), history, constraint)
    constraint.close()
    return tokens


def text_of(tokens: list[int]) -> str:
    decoded: str = tokenizers.Tokenizer.from_str(byte_level()).decode(tokens)
    return decoded


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_follows_schema(process: ConstraintProcess, temperature: float) -> None:
    found = set()
    for seed in range(8):
        tokens = generate(process, sampling(temperature=temperature, seed=seed))
        assert tokens[-1] == STOP
        value = json.loads(text_of(tokens))
        assert value.keys() == {"word", "count"}
        assert value["word"] in {"fox", "dog"}
        assert 0 <= value["count"] <= 99
        found.add(value["count"])
    assert len(found) == 1 if temperature == 0 else len(found) > 1


THINK, THOUGHT = 30, 31
"""Tokens that no JSON of SCHEMA has."""


@pytest.mark.parametrize(("begin", "drawn"), [(None, []), (THINK, [THINK])])
def test_json_begins_behind_reasoning(process: ConstraintProcess, begin: int | None, drawn: list[int]) -> None:
    options = sampling(reasoning_begin=begin, reasoning_end=THOUGHT, logit_bias=((STOP, 100.0),), max_tokens=400)
    thought = [*drawn, 50, 51, 52]
    for length in range(len(drawn), len(thought) + 1):
        assert draw_one(process, options, thought[:length]) != STOP, "a text does not end within its reasoning"
    tokens = generate(process, options, given=[*thought, THOUGHT])
    document = tokens[len(thought) + 1 :]
    assert json.loads(text_of(document))["word"] in {"fox", "dog"}
    for length in range(len(thought) + 1, len(tokens)):
        assert draw_one(process, options, tokens[:length]) == tokens[length], "a replay draws the same"


def test_reasoning_begins_with_the_first_token_or_never(process: ConstraintProcess) -> None:
    wanted = sampling(reasoning_begin=THINK, reasoning_end=THOUGHT, logit_bias=((THINK, 100.0),))
    assert draw_one(process, wanted, []) == THINK
    text = generate(process, sampling())
    assert THINK not in [draw_one(process, wanted, text[:length]) for length in range(1, len(text))]
    assert draw_one(process, sampling(logit_bias=((THINK, 100.0),)), []) != THINK, "where there is no reasoning"
    beyond = sampling(reasoning_begin=VOCABULARY, reasoning_end=VOCABULARY + 1)
    assert draw_one(process, beyond, []) == text[0], "a peer's odd token costs nothing"


def draw_one(process: ConstraintProcess, sampling: Sampling, text: Sequence[int]) -> int:
    """Return the token that is drawn behind a text."""
    history = history_for(sampling)
    assert history is not None
    history.reset([*PROMPT, *text])
    constraint = process.open(sampling.json_schema)
    position = len(PROMPT) + len(text)
    (token,) = draw_and_verify([logits(position)], sampling, position, (), history, constraint)
    constraint.close()
    return token


def test_replay_draws_the_same(process: ConstraintProcess) -> None:
    tokens = generate(process, sampling())
    for length in range(len(tokens)):
        assert generate(process, sampling(), given=tuple(tokens[:length])) == tokens


def test_drafts_draw_the_same(process: ConstraintProcess) -> None:
    options = sampling()
    tokens = generate(process, options)
    history = history_for(options)
    assert history is not None
    history.reset(PROMPT)
    constraint = process.open(SCHEMA)
    drawn: list[int] = []
    while len(drawn) < len(tokens):
        drafts = [*tokens[len(drawn) : len(drawn) + 2], 77][: len(tokens) - len(drawn)]  # the last one is wrong
        position = len(PROMPT) + len(drawn)
        rows = [logits(position + number) for number in range(len(drafts) + 1)]
        more = draw_and_verify(rows, options, position, drafts, history, constraint)
        drawn += more[: len(tokens) - len(drawn)]
    assert drawn == tokens


def serving(process: ConstraintProcess) -> psutil.Process:
    """Return the process that interprets schemas: the child of the one that has loaded the tokenizer."""
    assert process._child is not None
    return psutil.Process(process._child.pid).children()[0]


@pytest.mark.parametrize("whole", [False, True])
def test_death_of_the_process_changes_no_text(process: ConstraintProcess, whole: bool) -> None:
    tokens = generate(process, sampling())
    constraint, other = process.open(SCHEMA), process.open(SCHEMA)
    before = constraint.allowed(tokens[:3])[0], other.allowed([])[0]
    victim = serving(process)
    if whole:
        assert process._child is not None
        process._child.kill()
    victim.kill()
    victim.wait(5)
    after = constraint.allowed(tokens[:3])[0], other.allowed([])[0]
    assert all((one == another).all() for one, another in zip(before, after, strict=True))
    assert generate(process, sampling()) == tokens


def test_schema_that_takes_too_long_fails_its_own_text_only(process: ConstraintProcess) -> None:
    honest, hostile = process.open(SCHEMA), process.open(SCHEMA)
    before = honest.allowed([])[0]
    hostile.allowed([])
    victim = serving(process)
    victim.suspend()

    def end_its_time() -> None:
        os.kill(victim.pid, signal.SIGPROF)  # as the kernel does
        victim.resume()

    timer = threading.Timer(0.2, end_its_time)
    timer.start()
    with pytest.raises(BadRequest, match="too much time"):
        hostile.allowed([])
    timer.join()
    assert (honest.allowed([])[0] == before).all()
    assert generate(process, sampling())[-1] == STOP


def test_schema_that_is_slow_at_each_token_fails_its_own_text(
    process: ConstraintProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mask is within the limit of one step, but all other texts of the span wait for it."""
    process.start()
    tokenizer = llguidance.LLTokenizer(str(tmp_path / "tokenizer.json"), n_vocab=VOCABULARY)
    clock_s = iter(np.arange(0, 100, 0.4))  # read before and after each mask
    monkeypatch.setattr("time.process_time", lambda: next(clock_s))
    text = constraint_worker._Text(tokenizer, SCHEMA)
    text.mask(0, [])
    text.mask(0, [])
    with pytest.raises(ValueError, match="too much time"):
        text.mask(0, [])


def test_process_that_does_not_answer_is_replaced(process: ConstraintProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.engine.constraint.STEP_TIMEOUT_S", 0.3)
    constraint = process.open(SCHEMA)
    constraint.allowed([])
    victim = serving(process)
    victim.suspend()
    with pytest.raises(EngineError, match="does not answer") as caught:
        constraint.allowed([])
    assert not isinstance(caught.value, BadRequest), "the machine may be at fault"
    victim.wait(5)
    assert generate(process, sampling())[-1] == STOP


def test_schema_that_fails_in_mid_text_is_the_requests_fault(process: ConstraintProcess) -> None:
    assert schema_fault(UNSATISFIABLE) == "", "nothing shows before"
    constraint = process.open(UNSATISFIABLE)
    text = tokenizers.Tokenizer.from_str(byte_level()).encode('"' + "ab" * 40).ids
    assert constraint.allowed(text[:2])[0].any()
    with pytest.raises(BadRequest, match="cannot be followed: lexer error"):
        constraint.allowed(text)


def test_closed_process_is_started_again(process: ConstraintProcess) -> None:
    tokens = generate(process, sampling())
    victim = serving(process)
    process.close()
    victim.wait(5)
    assert generate(process, sampling()) == tokens


def test_only_new_tokens_are_sent(process: ConstraintProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = generate(process, sampling())
    asked: list[tuple[int, int]] = []
    ask = process.ask

    def note(request: Any) -> dict[str, Any]:
        asked.append((request["keep"], len(request["tokens"])))
        return ask(request)

    monkeypatch.setattr(process, "ask", note)
    constraint = process.open(SCHEMA)
    for text in (tokens[:4], tokens[:5], [*tokens[:3], tokens[3]], tokens[:5]):
        constraint.allowed(text)
    assert asked == [(0, 4), (4, 1), (4, 0), (4, 1)]


def test_hopeless_schema_fails_its_own_text_only(process: ConstraintProcess) -> None:
    honest = process.open(SCHEMA)
    bad = process.open('{"type": "nonsense"}')
    with pytest.raises(EngineError, match="nonsense"):
        bad.allowed([])
    assert honest.allowed([])[0].any()


def test_node_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="lacks the model's tokenizer") as caught:
        ConstraintProcess(tmp_path / "tokenizer.json", VOCABULARY).start()
    assert not isinstance(caught.value, BadRequest), "another peer may have it"


def test_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {"type": "unheard of"}}')
    with pytest.raises(BadRequest, match="its tokenizer cannot be read"):
        ConstraintProcess(file, VOCABULARY).start()


def test_process_imports_nothing_from_the_current_directory(
    process: ConstraintProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    mark = hostile_directory.fill(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    process.start()
    assert not mark.exists()


def test_process_that_cannot_be_started_is_an_engine_error(
    process: ConstraintProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(EngineError, match="cannot be interpreted here"):
        process.start()


def test_no_stop_token_is_an_error_at_the_end(process: ConstraintProcess) -> None:
    with pytest.raises(BadRequest, match="no token can follow"):
        generate(process, sampling(stop_tokens=(), json_schema='{"const": "fox"}'))


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (SCHEMA, ""),
        ("{}", ""),
        ('{"type": "nonsense"}', "nonsense"),
        ('{"$ref": "http://example.org/schema"}', "http://example.org/schema"),
        ("[]", "object"),
    ],
)
def test_schema_is_checked_before_a_job_begins(schema: str, fault: str) -> None:
    found = schema_fault(schema)
    assert bool(found) == bool(fault), found
    assert "\n" not in found
