"""What the child processes of an import find out about a GGUF file, or say why not."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from tokenizers import Tokenizer

from node.engine.gguf_tokenizer import write_tokenizer
from node.models import sources
from node.models.errors import ModelError
from node.models.files import ignore_progress
from node.models.gguf_file import GgufError, read_gguf
from tests.unit.models.gguf_files import VOCABULARY, metadata, tensors, write_gguf

Child = Callable[[str], None]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    """Have a Python program run in the place of the next child."""

    def replace(program: str) -> None:
        monkeypatch.setattr(sources, "python", lambda *_arguments: (sys.executable, "-c", program))

    return replace


def test_the_granularity_is_what_the_trial_finds(tmp_path: Path, child: Child) -> None:
    reports: list[tuple[str, int, int]] = []
    child('print("llama.cpp says hello"); print(\'{"granularity": 6}\')')
    assert sources.find_granularity(tmp_path / "x.gguf", lambda *report: reports.append(report)) == 6
    assert reports == [("test the architecture", 0, 1), ("test the architecture", 1, 1)]


def test_model_that_cannot_be_tried_out_is_served_whole_with_the_reason_told(tmp_path: Path) -> None:
    weights = tensors() | {f"blk.{block}.attn_extra.weight": np.zeros((37, 32), np.float32) for block in range(2)}
    path = write_gguf(tmp_path / "x.gguf", metadata(), weights)
    with structlog.testing.capture_logs() as logs:
        assert sources.find_granularity(path, ignore_progress) == 2
    [log] = logs
    assert "served whole only" in log["event"]
    assert "'blk.0.attn_extra.weight' has an axis of 37" in log["reason"]


@pytest.mark.parametrize(
    ("program", "line"),
    [
        (
            'print(\'{"error": "llama.cpp does not know the architecture plamo9000"}\'); raise SystemExit(1)',
            "^cannot import x.gguf: llama.cpp does not know the architecture plamo9000$",
        ),
        ("print('no result')", "cannot import x.gguf: the test of its architecture gave no result"),
        ('print(\'{"granularity": "six"}\')', "gave no result"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "cannot import x.gguf: the test of its architect"),
    ],
)
def test_a_model_that_llama_cpp_cannot_run_is_one_line(tmp_path: Path, child: Child, program: str, line: str) -> None:
    child(program)
    with pytest.raises(ModelError, match=line) as error:
        sources.find_granularity(tmp_path / "x.gguf", ignore_progress)
    assert "\n" not in str(error.value)


def make_tokenizer(tmp_path: Path, keys: dict[str, Any]) -> Path:
    folder = tmp_path / "tokenizer"
    sources.make_gguf_tokenizer(write_gguf(tmp_path / "tiny.gguf", keys, tensors()), folder, ignore_progress)
    return folder


def test_the_tokenizer_is_made_without_the_weights(tmp_path: Path) -> None:
    # No architecture that transformers knows, so that only the vocabulary can have been used.
    keys = metadata("plamo9000") | {"tokenizer.chat_template": "{{ messages }}"}
    folder = make_tokenizer(tmp_path, keys)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_end|>ab").ids == [2, 96]
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_file_without_vocabulary_gives_no_tokenizer(tmp_path: Path) -> None:
    assert list(make_tokenizer(tmp_path, metadata(tokenizer=False)).iterdir()) == []


def test_a_vocabulary_of_an_unsupported_kind_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^tiny.gguf has a tokenizer of type 'bert', which is not supported$"):
        make_tokenizer(tmp_path, metadata() | {"tokenizer.ggml.model": "bert"})


@pytest.mark.parametrize(
    ("own", "begins", "ends"),
    [
        ({}, False, False),
        ({"tokenizer.ggml.add_bos_token": True}, True, False),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, True, True),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True, False),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False, False),
    ],
)
def test_texts_begin_and_end_as_the_file_says(tmp_path: Path, own: dict[str, Any], begins: bool, ends: bool) -> None:
    write_tokenizer(read_gguf(write_gguf(tmp_path / "tiny.gguf", metadata() | own, tensors())), tmp_path / "tokenizer")
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json")).encode("ab").ids
    assert (ids[0] == 1, ids[-1] == 2) == (begins, ends)


def test_special_tokens_beyond_ascii_are_whole(tmp_path: Path) -> None:
    # As in DeepSeek-R1-Distill, whose marks have full-width bars; and as in GPT-NeoX, with runs of spaces.
    begin, end, user, assistant = (
        f"<\uff5c{name}\uff5c>" for name in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant")
    )
    marks = {begin: 3, end: 3, user: 3, assistant: 4, "  ": 4}
    vocabulary = [*marks, *VOCABULARY[3:], "Ġ", "ĠĠ"]
    keys = metadata() | {
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [*marks.values(), *[1] * (len(vocabulary) - len(marks))],
        "tokenizer.ggml.merges": ["a b", "Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    folder = make_tokenizer(tmp_path, keys)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for token, text in enumerate(marks):
        assert tokenizer.encode(f"a{text}ab", add_special_tokens=False).ids == [
            vocabulary.index("a"), token, vocabulary.index("ab"),
        ]  # fmt: skip
    assert tokenizer.encode(user).ids == [0, 2]
    assert tokenizer.decode([0, 2, 4, 5]) == "  !"
    assert tokenizer.get_vocab_size() == len(vocabulary)
    assert tokenizer.id_to_token(vocabulary.index("ĠĠ")) == "ĠĠ"
    roles = json.loads((folder / "tokenizer_config.json").read_text())
    assert roles == {"bos_token": begin, "eos_token": end}


def test_special_token_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    vocabulary = ["<unk>", "<s>", "</s>", "▁", "a", "▁▁▁"]
    keys = metadata("gemma") | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*vocabulary, "    "],
        "tokenizer.ggml.scores": [0.0] * 7,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 4],
    }
    del keys["tokenizer.ggml.merges"]
    path = write_gguf(tmp_path / "tiny.gguf", keys, tensors())
    with pytest.raises(GgufError, match=r"has a token 6, '    ', that would be read as other tokens: import"):
        write_tokenizer(read_gguf(path), tmp_path / "tokenizer")


def test_a_way_of_splitting_texts_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata() | {"tokenizer.ggml.pre": "deepseek-llm"}, tensors())
    with pytest.raises(GgufError, match=r"tokenizer.ggml.pre = 'deepseek-llm', a way of splitting texts"):
        write_tokenizer(read_gguf(path), tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
