"""An 8B-shaped model in Q4_0 over four daemons with 1700 MiB each, beside llama.cpp alone.

    python -m benchmarks.eight_billion [--folder DIR] [--rounds N] [--tokens N] [--threads N] [--tiny] [--json]

A GGUF file of the shape of Llama 3.1 8B with random weights (4.65 GB) is written and imported. One daemon holds its
files and serves nothing; four others, with empty caches, are told the model and their memory only: they choose their
blocks and fetch them from the first. As soon as the model is complete, jobs at that first daemon and llama.cpp alone on
the file (its own loop, default parameters, threads that do not spin as ours) decode in turn. A job is in one stage at a
time, so each daemon has as many threads as llama.cpp alone. DIR needs 20 GB, the machine about 16 GiB of memory.
`--tiny`: the same with a tiny model.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import describe_machine
from benchmarks.daemons import Daemon, running_daemon, until
from benchmarks.gguf_import import MIB, memory_of, watched_import
from benchmarks.llamacpp import LlamaCpp
from node.engine.llamacpp.library import load_library
from node.models.store import ModelStore
from node.stages.memory_admission import span_bytes_for
from protocol.identity import BlockRange
from selector.task import BASELINES, PackageFormat
from tests.support.random_llama import LLAMA_8B, LlamaShape, write_llama

NODES: Final = 4
TARGET: Final = 0.85
NAME: Final = "random-llama"
TINY: Final = LlamaShape(blocks=32, hidden=256, inner=512, heads=8, kv_heads=2, vocabulary=2048)
MEMORY: Final = "1700MiB"
TINY_SPAN: Final = BlockRange(0, 9)
"""What fits into a daemon's memory of the tiny model."""

APART_S: Final = 2.0
"""Between the starts of two daemons."""
COMPLETE_WITHIN_S: Final = 900.0
JOB_TIMEOUT_S: Final = 600.0
PROMPT: Final = [2 + 7 * number % 90 for number in range(16)]


@click.command()
@click.option("--folder", type=click.Path(file_okay=False, exists=True), help="Where the files are made.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of both, in turn.")
@click.option("--tokens", type=click.IntRange(2), default=24, show_default=True, help="Decoded in each round.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Of llama.cpp and each daemon.")
@click.option("--tiny", is_flag=True, help="A tiny model, to try the benchmark itself.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(folder: str | None, rounds: int, tokens: int, threads: int, tiny: bool, as_json: bool) -> None:
    """Serve an 8B-shaped model with four small nodes."""
    with TemporaryDirectory(prefix="metaswarm-8b-", dir=folder) as scratch:
        shape = TINY if tiny else LLAMA_8B
        source = write_llama(Path(scratch, "source.gguf"), shape)
        imported = watched_import(source, Path(scratch, "cache"), "--name", NAME)
        result = trio.run(_serve, Path(scratch), source, shape, rounds, tokens, threads)
    result = {"machine": describe_machine(), "import": imported, **result}
    click.echo(json.dumps(result) if as_json else report(result))


async def _serve(
    folder: Path, source: Path, shape: LlamaShape, rounds: int, tokens: int, threads: int
) -> dict[str, Any]:
    store = ModelStore(folder / "cache")
    package = store.get(store.resolve(NAME))
    model = str(package.model_id)
    memory = MEMORY if shape == LLAMA_8B else str(span_bytes_for(package.manifest, TINY_SPAN))
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(
            running_daemon(folder / "holder", "--cache-dir", str(folder / "cache"), "--threads", str(threads))
        )
        flags = ["--serve", model, "--memory", memory, "--threads", str(threads)]
        flags += ["--bootstrap", holder.ready.multiaddrs[0]]
        began_s = time.perf_counter()
        daemons: list[Daemon] = []

        async def start(number: int) -> None:
            await trio.sleep(APART_S * number)
            own = ("--cache-dir", str(folder / f"cache-{number}"))
            context = running_daemon(folder / f"node-{number}", *flags, *own, timeout_s=COMPLETE_WITHIN_S)
            daemons.append(await stack.enter_async_context(context))

        async with trio.open_nursery() as nursery:
            for number in range(NODES):
                nursery.start_soon(start, number)
        await until(partial(_is_complete, holder), COMPLETE_WITHIN_S)
        complete_s = time.perf_counter() - began_s
        first = await _job(holder, model, tokens)
        alone = LlamaCpp(load_library(), source, threads)
        swarm_rates: list[float] = []
        alone_rates: list[float] = []
        texts = {tuple(first["tokens"])}
        for number in range(rounds + 1):
            job = await _job(holder, model, tokens)
            rate, text = _alone(alone.step, tokens)
            texts |= {tuple(job["tokens"]), tuple(text)}
            if number:  # the first warms up
                swarm_rates.append(job["tokens_per_s"])
                alone_rates.append(rate)
        spans = [(await each.get("/swarm/status"))["spans"] for each in daemons]
        resident_mib = [memory_of(each.process.pid)[1] / MIB for each in daemons]
    return {
        "complete_s": complete_s,
        "first_job_s": first["total_s"],
        "spans": sorted([span["start"], span["end"]] for each in spans for span in each),
        "route": job["route"],
        "memory_mib": resident_mib,
        "swarm_tokens_per_s": statistics.median(swarm_rates),
        "alone_tokens_per_s": statistics.median(alone_rates),
        "ratios": [ours / theirs for ours, theirs in zip(swarm_rates, alone_rates, strict=True)],
        "same_text": len(texts) == 1,
    }


async def _is_complete(daemon: Daemon) -> bool:
    models = (await daemon.get("/swarm/models"))["models"]
    return any(model["complete"] for model in models)


async def _job(daemon: Daemon, model: str, tokens: int) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    async with httpx.AsyncClient(base_url=daemon.ready.api_url, timeout=JOB_TIMEOUT_S) as client:
        # Named, as a swarm that chooses its methods tries others out when it has nothing to do: beside llama.cpp alone.
        options = {"ignore_eos": True, "method": BASELINES[PackageFormat.GGUF].name}
        answer = await client.post("/v1/completions", json={**body, "metaswarm": options})
    found = answer.raise_for_status().json()["metaswarm"]
    return {
        "tokens": found["token_ids"],
        "tokens_per_s": 1 / found["timing"]["tpot_s"],
        "total_s": found["timing"]["total_s"],
        "route": [[stage["start"], stage["end"]] for stage in found["route"]],
    }


def _alone(step: Callable[..., list[int]], tokens: int) -> tuple[float, list[int]]:
    """Return the rate of llama.cpp's own loop, and its text."""
    text = step([(0, 0, PROMPT)])
    began_s = time.perf_counter()
    while len(text) < tokens:
        text += step([(0, len(PROMPT) + len(text) - 1, text[-1:])])
    return (tokens - 1) / (time.perf_counter() - began_s), text


def report(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    imported, ratio = result["import"], statistics.median(result["ratios"])
    memory = ", ".join(f"{each:.0f}" for each in result["memory_mib"])
    ratios = ", ".join(f"{each:.2f}" for each in result["ratios"])
    text = "the same text" if result["same_text"] else "OTHER TEXTS"
    return (
        f"imported {imported['file_gb']:.2f} GB in {imported['took_s']:.1f} s, memory with all children at most "
        f"{imported['memory_together_mib']:.0f} MiB, disk {imported['disk_over_file']:.3f} times the file; tried "
        f"out by {', '.join(imported['tried'])}\n"
        f"complete {result['complete_s']:.0f} s after the first start, with blocks {_listed(result['spans'])}; "
        f"first job {result['first_job_s']:.1f} s\n"
        f"route: blocks {_listed(result['route'])}; memory of the daemons {memory} MiB\n"
        f"{result['swarm_tokens_per_s']:.2f} tokens/s, llama.cpp alone {result['alone_tokens_per_s']:.2f}: ratio "
        f"{ratio:.2f} (aim: {TARGET}; of all rounds {ratios}); {text}"
    )


def _listed(spans: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{start}-{end}" for start, end in spans)


if __name__ == "__main__":
    main()
