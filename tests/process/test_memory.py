"""The memory that `status` and `doctor` name is enough for the command that they name, and a tenth less is not."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio

from node.models.importer import import_model
from node.models.store import ModelStore, Package
from tests.process.daemons import StartDaemon, is_complete, until
from tests.unit.models.checkpoints import Tensors, write_checkpoint

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, BLOCKS = 512, 1536, 8, 4, 8192, 3
MIB = 1 << 20


def random_llama() -> Tensors:
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, dtype=np.float32) / 16).astype(np.float16)

    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    mlp = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "lm_head.weight": matrix(VOCABULARY, HIDDEN)}
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float16)
    for block in range(BLOCKS):
        layer = f"model.layers.{block}"
        for name, shape in shapes.items():
            tensors[f"{layer}.self_attn.{name}.weight"] = matrix(*shape)
        for name, shape in mlp.items():
            tensors[f"{layer}.mlp.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = np.ones(HIDDEN, np.float16)
    return tensors


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, cache: Path) -> Package:
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": BLOCKS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    }
    folder = write_checkpoint(tmp_path / "random", random_llama(), config=config)
    return import_model(str(folder), ModelStore(cache), name="random")


async def run(cache: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "node", *arguments, "--cache-dir", str(cache), "--device", "cpu"]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_hinted_memory_is_enough_and_a_tenth_less_is_refused(
    start_daemon: StartDaemon, package: Package, cache: Path, tmp_path: Path
) -> None:
    first = await start_daemon("--serve", "random:0-1", "--cache-dir", str(cache), "--threads", "1")
    [gap] = (await first.get("/swarm/status"))["uncovered"]
    assert gap["serve"] == "random:1-3"
    # What doctor says of the same gap, and of a node that is given too little.
    little = str(gap["memory_bytes"] * 9 // 10)
    node = ("--data-dir", str(tmp_path / "little"), "--serve", gap["serve"], "--memory", little)
    address = ("--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--bootstrap", first.multiaddr)
    _, told, _ = await run(cache, "doctor", "--json", "--data-dir", str(first.data_dir))
    [hint] = [each["message"] for each in json.loads(told)["findings"] if each["fault"] == "missing-block"]
    assert f"--serve random:1-3 and --memory {gap['memory_bytes'] // MIB}MiB" in hint
    _, told, _ = await run(cache, "doctor", "--json", *node, *address)
    [refused] = [each["message"] for each in json.loads(told)["findings"] if each["fault"] == "no-memory"]
    assert f"give the node --memory {gap['memory_bytes'] // MIB}MiB" in refused

    code, _, log = await run(cache, "node", *node, *address)
    assert code == 1
    [line] = [line for line in log.splitlines() if line.startswith("metaswarm: ")]
    missing = -(-(gap["memory_bytes"] - int(little)) // MIB)
    assert re.search(
        f"cannot serve random:1-3: it needs .* {missing} MiB more than it has.*; blocks 1-2 would fit", line
    )

    second = await start_daemon(
        *("--serve", gap["serve"], "--memory", str(gap["memory_bytes"]), "--threads", "1"),
        *("--cache-dir", str(cache), "--bootstrap", first.multiaddr),
    )
    [span] = (await second.get("/swarm/status"))["spans"]
    assert (span["start"], span["end"]) == (1, 3)
    assert span["kv_positions"] >= 2048
    await until(partial(is_complete, first))
