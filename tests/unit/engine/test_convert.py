"""A GGUF file becomes the same Hugging Face folder everywhere; a file that is none is said to be so in one line."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(ord("!"), ord("~"))), "ab"]
HIDDEN, HEADS, BLOCKS = 32, 2, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama model with half of its matrices quantised."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(VOCABULARY), HIDDEN), "output_norm": (HIDDEN,)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (64, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (HIDDEN, 64)}
        shapes |= {f"blk.{block}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        weights = random.standard_normal(shape, dtype=np.float32)
        if "ffn_" in name and len(shape) == 2:
            quantised = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(source: Path, out_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "node.engine.convert", "gguf", str(source), str(out_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_gguf_file_becomes_the_same_folder_each_time(source: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes(source.read_bytes())
    folders = [tmp_path / "one", tmp_path / "two"]
    with convert(source, folders[0]) as first, convert(moved, folders[1]) as second:
        outputs = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    progress = [json.loads(line) for line in outputs[0][0].splitlines()]
    assert [line for line in progress if line["done"] == line["total"]] == [
        {"stage": "tokenizer", "done": 1, "total": 1},
        {"stage": "dequantise", "done": 2 + 9 * BLOCKS, "total": 2 + 9 * BLOCKS},
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
    [(None, "No such file"), (b"PK\x03\x04 a zip file", "is no GGUF file"), (b"GGUF\x03\0\0\0", "cannot be read")],
)
def test_what_is_no_gguf_file_is_said_in_one_line(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with convert(path, tmp_path / "out") as process:
        output, errors = process.communicate()
    assert process.returncode == 1
    assert errors == ""
    assert complaint in json.loads(output.splitlines()[-1])["error"]
    assert not (tmp_path / "out").exists()
