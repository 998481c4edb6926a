"""A GGUF file becomes the same Hugging Face folder everywhere; a file that is none is said to be so in one line."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, modeling_gguf_pytorch_utils

from node.engine.convert import ConversionError, convert_gguf
from node.models.gguf_file import read_gguf
from node.models.gguf_metadata import ropes
from tests.unit.models.gguf_files import (
    BLOCKS,
    HEAD_SIZE,
    HIDDEN,
    Tensors,
    metadata,
    tensors,
    without,
    write_gguf,
    write_split,
)

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama model with half of its matrices quantised."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, metadata() | {"tokenizer.chat_template": TEMPLATE}, quantised="ffn_")


def convert(source: Path, out_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "node.engine.convert", "gguf", str(source), str(out_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_gguf_conversion_is_deterministic(source: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes(source.read_bytes())
    folders = [tmp_path / "one", tmp_path / "two"]
    with convert(source, folders[0]) as first, convert(moved, folders[1]) as second:
        outputs = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    progress = [json.loads(line) for line in outputs[0][0].splitlines()]
    assert [line for line in progress if line["done"] == line["total"]] == [
        {"stage": "tokenizer", "done": 1, "total": 1},
        {"stage": "dequantise", "done": 3 + 9 * BLOCKS, "total": 3 + 9 * BLOCKS},
        {"stage": "write", "done": 1, "total": 1},
    ]
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} < files[0].keys()
    assert files[0]["chat_template.jinja"].decode() == TEMPLATE
    texts = b"".join(content for name, content in files[0].items() if name.endswith(".json"))
    assert b"version" not in texts.replace(b'"version": "1.0"', b"")  # the format of tokenizer.json
    assert str(tmp_path).encode() not in texts
    weights = load_file(folders[0] / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float32)}
    assert hashlib.sha256(weights["model.layers.0.self_attn.q_proj.weight"].tobytes()).digest() != bytes(32)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file"), (b"PK\x03\x04 a zip file", "is not a GGUF file"), (b"GGUF\x03\0\0\0", "cut short")],
)
def test_non_gguf_file_is_refused_in_one_line(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with convert(path, tmp_path / "out") as process:
        output, errors = process.communicate()
    assert process.returncode == 1
    assert errors == ""
    assert complaint in json.loads(output.splitlines()[-1])["error"]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for a conversion in this process, whose hold on the libraries ends with the test."""
    monkeypatch.setattr(gguf, "GGUFReader", gguf.GGUFReader)
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "tqdm", vars(modeling_gguf_pytorch_utils)["tqdm"])
    monkeypatch.setattr("sys.stdout.write", lambda _text: None, raising=False)
    return tmp_path / "out"


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_split_gguf_gives_the_same_model_as_one_file(tmp_path: Path, out: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "whole.gguf"), out)
    parts = write_split(tmp_path / "parts", count=3)
    convert_gguf(parts[1], tmp_path / "joined")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "joined").iterdir()
    }


Edit = Callable[[Tensors], Tensors]
EXTRA = np.ones(HIDDEN, np.float32)
FAULTS: dict[str, tuple[str, Edit, str]] = {
    "blocks": ("llama", lambda w: without(w, ["blk.1"]), r"lacks tensors of block 1 \(blk.1.attn_k.weight, …\)"),
    "a norm": ("llama", lambda w: without(w, ["output_norm"]), "lacks output_norm.weight: it is not the whole model"),
    "embedding": ("llama", lambda w: without(w, ["token_embd"]), "lacks token_embd.weight"),
    "all experts": ("qwen3moe", lambda w: without(w, ["blk.0.ffn_gate_exps"]), r"block 0 \(blk.0.ffn_gate_exps.weight"),
    "half of the experts": ("qwen3moe", lambda w: without(w, ["blk.1.ffn_up_exps"]), r"block 1 \(blk.1.ffn_up_exps"),
    "a bias": ("starcoder2", lambda w: without(w, ["blk.1.attn_q.bias"]), r"block 1 \(blk.1.attn_q.bias"),
    "a bias too many": ("llama", lambda w: {**w, "blk.0.attn_q.bias": EXTRA}, r"has tensors of block 0 .*does not use"),
    "a scale": ("llama", lambda w: {**w, "blk.0.attn_q.scale": EXTRA}, "does not use"),
    "a block too many": (
        "llama",
        lambda w: {**w, "blk.2.attn_norm.weight": EXTRA},
        r"has tensors of block 2 .*does not use",
    ),
    "another size": (
        "llama",
        lambda w: {**w, "blk.0.ffn_up.weight": w["blk.0.ffn_up.weight"][:8]},
        r"blk.0.ffn_up.weight has shape \[8, 32\], which does not make \[64, 32\]",
    ),
    "another form": (
        "llama",
        lambda w: {**w, "blk.0.ffn_up.weight": np.ascontiguousarray(w["blk.0.ffn_up.weight"].T)},
        "does not fit its architecture|cannot be read",
    ),
}


@pytest.mark.parametrize(("architecture", "edit", "line"), FAULTS.values(), ids=FAULTS)
def test_gguf_with_tensors_of_another_architecture_is_refused(
    tmp_path: Path, out: Path, architecture: str, edit: Edit, line: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata(architecture), edit(tensors(architecture)))
    with pytest.raises(ConversionError, match=line) as error:
        convert_gguf(path, out)
    assert "\n" not in str(error.value)
    assert not out.exists()


SCALINGS: dict[str, tuple[str, dict[str, Any], dict[str, list[float]]]] = {
    "none": ("llama", {}, {}),
    "another base": ("starcoder2", {"rope__freq_base": 999999.0}, {}),
    "linear": ("llama", {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {}),
    "yarn": (
        "qwen2",
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 32,
            "context_length": 128,
        },
        {},
    ),
    "llama 3": ("llama", {}, {"rope_freqs.weight": [1.0, 8.0, 8.0, 8.0]}),
    "longrope": (
        "phi3",
        {"rope__scaling__attn_factor": 1.25, "rope__scaling__original_context_length": 32},
        {"rope_factors_short.weight": [1.0, 1.5, 2.0, 3.0], "rope_factors_long.weight": [1.0, 4.0, 9.0, 16.0]},
    ),
}


@pytest.mark.parametrize(("architecture", "own", "factors"), SCALINGS.values(), ids=SCALINGS)
def test_model_has_the_rope_frequencies_of_its_gguf(
    tmp_path: Path, out: Path, architecture: str, own: dict[str, Any], factors: dict[str, list[float]]
) -> None:
    weights = {**tensors(architecture), **{name: np.array(values, np.float32) for name, values in factors.items()}}
    path = write_gguf(tmp_path / "tiny.gguf", metadata(architecture, **own), weights)
    convert_gguf(path, out)
    (rope,) = ropes(read_gguf(path)).values()
    model = AutoModelForCausalLM.from_pretrained(out)
    rotary = model.model.rotary_emb
    np.testing.assert_allclose(rotary.inv_freq.numpy(), rope.frequencies, rtol=4e-6)
    assert rotary.attention_scaling == pytest.approx(rope.attention_factor)


def test_gemma3_scales_its_global_layers_only(tmp_path: Path, out: Path) -> None:
    own: dict[str, Any] = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0, "rope__freq_base": 1e6}
    path = write_gguf(
        tmp_path / "tiny.gguf",
        metadata("gemma3", **own, attention__sliding_window=8, attention__key_length=HEAD_SIZE),
        tensors("gemma3", output=False),
    )
    convert_gguf(path, out)
    said = config_of(out)["rope_parameters"]
    assert said["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert said["sliding_attention"]["rope_type"] == "default"
    assert said["sliding_attention"]["rope_theta"] == 10000.0


def test_untied_head_is_not_replaced_by_the_embedding(tmp_path: Path, out: Path) -> None:
    weights = tensors("falcon")
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata("falcon"), weights), out)
    assert config_of(out)["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(out / "model.safetensors")["lm_head.weight"], weights["output.weight"])


def test_experts_keep_their_number_and_size(tmp_path: Path, out: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata("qwen3moe"), tensors("qwen3moe")), out)
    config = AutoConfig.from_pretrained(out)
    assert (config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok) == (24, 4, 2)
    assert config.norm_topk_prob is True


def test_a_model_called_mistral_gets_no_sliding_window(tmp_path: Path, out: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata() | {"general.name": "mistral"}), out)
    assert (config_of(out)["model_type"], config_of(out).get("sliding_window")) == ("llama", None)


def test_a_file_without_tokenizer_gives_a_model_without(tmp_path: Path, out: Path) -> None:
    keys = metadata(tokenizer=False, vocab_size=tensors()["token_embd.weight"].shape[0])
    for name in ("absent", "none"):
        stated = {} if name == "absent" else {"tokenizer.ggml.model": "none"}
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", keys | stated), tmp_path / name)
        assert not list((tmp_path / name).glob("tokenizer*"))
        assert config_of(tmp_path / name)["eos_token_id"] is None


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
def test_texts_begin_and_end_as_the_file_says(
    tmp_path: Path, out: Path, own: dict[str, Any], begins: bool, ends: bool
) -> None:
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata() | own), out)
    ids = Tokenizer.from_file(str(out / "tokenizer.json")).encode("ab").ids
    assert (ids[0] == 1, ids[-1] == 2) == (begins, ends)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "tokenizer.ggml.pre = 'deepseek-llm', a way of splitting texts"),
        ({"tokenizer.ggml.model": "bert"}, "has a tokenizer of type 'bert', which is not supported"),
    ],
)
def test_a_tokenizer_that_would_be_wrong_is_refused(tmp_path: Path, out: Path, own: dict[str, Any], line: str) -> None:
    with pytest.raises(ConversionError, match=line):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata() | own), out)
    assert not out.exists()
