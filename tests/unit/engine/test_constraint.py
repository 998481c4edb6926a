"""Texts that follow a JSON Schema, with the real library in its process."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from node.engine.constraint import ConstraintProcess
from node.engine.interface import EngineError
from node.engine.sampling import draw_and_verify, history_for
from node.models.json_schema import schema_fault
from protocol.messages import Sampling
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


def generate(process: ConstraintProcess, sampling: Sampling, *, given: tuple[int, ...] = ()) -> list[int]:
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
    assert len(found) == (1 if temperature == 0 else 8) or temperature


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


def test_survives_the_end_of_the_process(process: ConstraintProcess) -> None:
    tokens = generate(process, sampling())
    constraint = process.open(SCHEMA)
    before, _ = constraint.allowed(tokens[:3])
    assert process._child is not None
    process._child.kill()
    with pytest.raises(EngineError, match=r"too much time or memory|interpreted"):
        constraint.allowed(tokens[:4])
    after, _ = constraint.allowed(tokens[:3])
    assert (before == after).all()


def test_schema_that_takes_too_long_is_given_up(process: ConstraintProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.engine.constraint.STEP_TIMEOUT_S", 0.3)
    constraint = process.open(SCHEMA)
    constraint.allowed([])
    assert process._child is not None
    os.kill(process._child.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="too much time"):
        constraint.allowed([])
    assert generate(process, sampling())[-1] == STOP


def test_hopeless_schema_fails_its_own_text_only(process: ConstraintProcess) -> None:
    honest = process.open(SCHEMA)
    bad = process.open('{"type": "nonsense"}')
    with pytest.raises(EngineError, match="nonsense"):
        bad.allowed([])
    assert honest.allowed([])[0].any()


def test_node_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="lacks the model's tokenizer"):
        ConstraintProcess(tmp_path / "tokenizer.json", VOCABULARY).open(SCHEMA)


def test_no_stop_token_is_an_error_at_the_end(process: ConstraintProcess) -> None:
    with pytest.raises(EngineError, match="no token can follow"):
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
