"""Bytes, memory, disk and time that importing from a hub takes.

    python -m benchmarks.hub_import [--size GB] [--folder DIR] [--json]

A Llama of 30 blocks of random weights in bfloat16, made for this, is imported from a server with a hub's routes on this
machine: whole; its first 10 blocks with the manifest at hand; and these without it, so that the rest is only hashed.
Memory is the greatest proportional set size of `metaswarm model import` without the short-lived process that compares
shapes, which loads torch; disk is the most that the cache holds at any time. DIR needs room for three times the size.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import psutil

from benchmarks.common import describe_machine, verdict
from node.util.child_process import running
from node.util.disk_cache import folder_bytes
from node.util.interpreter import child_environment, python
from tests.support.hub_server import HubServer, serve_hub

TARGET_MIB = 150.0
MIB = 2**20
POLL_S = 0.05
BLOCKS = 30
WIDTH = 1024
VOCABULARY = 32_000
REPOSITORY = "somebody/random"


@click.command()
@click.option("--size", "size_gb", type=float, default=2.0, show_default=True, help="Size of the model, in GB.")
@click.option("--folder", type=click.Path(file_okay=False, exists=True), help="Where the files are made.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(size_gb: float, folder: str | None, as_json: bool) -> None:
    """Measure imports from a hub."""
    with TemporaryDirectory(prefix="metaswarm-hub-", dir=folder) as scratch, serve_hub(Path(scratch, "hub")) as hub:
        weights = write_repository(hub.folder / REPOSITORY, int(size_gb * 1e9))
        whole = measure(hub, weights, Path(scratch, "whole"))
        manifest = next(Path(scratch, "whole", "models").glob("*/manifest.json"))
        span = ("--blocks", "0-10")
        cases = {
            "whole": whole,
            "blocks 0-10, manifest at hand": measure(
                hub, weights, Path(scratch, "span"), *span, "--manifest", str(manifest)
            ),
            "blocks 0-10, manifest unknown": measure(hub, weights, Path(scratch, "hashed"), *span),
        }
    result = {"machine": describe_machine(), "model_gb": weights / 1e9, "cases": cases}
    click.echo(json.dumps(result) if as_json else report(result))


def write_repository(folder: Path, size_bytes: int) -> int:
    """Write a checkpoint of about this size; return the size of its weights."""
    inner = max(1, (size_bytes // 2 // BLOCKS - 4 * WIDTH * WIDTH) // (3 * WIDTH))
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj": (inner, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj": (WIDTH, inner)}
        shapes |= {f"{prefix}.{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in sorted(shapes.items()):
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    config = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": inner, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    text, noise = json.dumps(header).encode(), os.urandom(1 << 20)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(noise[: min(end, len(noise))])
        return file.tell()


def measure(hub: HubServer, weights_bytes: int, cache: Path, *options: str) -> dict[str, float]:
    """Import into an empty cache, and return the figures."""
    hub.sent.clear()
    hub.requests.clear()
    cache.mkdir()
    command = python("-m", "node", "model", "import", REPOSITORY, "--cache-dir", str(cache), *options)
    environment = child_environment({"HF_ENDPOINT": hub.url, "HF_HOME": str(cache / "hub")})
    memory_bytes = stored_bytes = 0
    began_s = time.perf_counter()
    with running(command, what="the import", environment=environment) as child:
        while child.process.poll() is None:
            with suppress(psutil.Error):
                memory_bytes = max(memory_bytes, psutil.Process(child.process.pid).memory_full_info().pss)
            stored_bytes = max(stored_bytes, folder_bytes(cache))
            time.sleep(POLL_S)
        child.check()
    return {
        "took_s": time.perf_counter() - began_s,
        "read_over_weights": hub.sent["model.safetensors"] / weights_bytes,
        "requests": len(hub.content()),
        "disk_over_weights": stored_bytes / weights_bytes,
        "memory_mib": memory_bytes / MIB,
    }


def report(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"{'import of ' + format(result['model_gb'], '.2f') + ' GB':<32} read   disk  memory      time  requests"]
    for name, case in result["cases"].items():
        read, disk = case["read_over_weights"], case["disk_over_weights"]
        lines.append(
            f"{name:<31} {read:5.3f}  {disk:5.3f}  {case['memory_mib']:3.0f} MiB  {case['took_s']:6.1f} s  "
            f"{case['requests']:8.0f}"
        )
    memory = max(case["memory_mib"] for case in result["cases"].values())
    return "\n".join([*lines, f"memory at most {TARGET_MIB:.0f} MiB: {verdict(memory, TARGET_MIB)}"])


if __name__ == "__main__":
    main()
