"""Memory, disk and time that importing a large GGUF file takes.

    python -m benchmarks.gguf_import [--size GB] [--folder DIR] [--json]

The file is a Llama of random weights in Q8_0, made for this. Memory is the greatest proportional set size of
`metaswarm model import` and all its child processes together, and of the command alone; disk is the most that the cache
holds at any time, beside the file's own size. DIR needs room for twice the size.
"""

import json
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
from node.util.interpreter import python
from tests.unit.models.gguf_files import write_large

TARGET_MIB = 300.0
MIB = 2**20
POLL_S = 0.1


@click.command()
@click.option("--size", "size_gb", type=float, default=5.0, show_default=True, help="Size of the file, in GB.")
@click.option("--folder", type=click.Path(file_okay=False, exists=True), help="Where the files are made.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(size_gb: float, folder: str | None, as_json: bool) -> None:
    """Measure the import of a large GGUF file."""
    result = measure(int(size_gb * 1e9), folder)
    click.echo(json.dumps(result) if as_json else report(result))


def measure(size_bytes: int, folder: str | None) -> dict[str, Any]:
    """Return all figures."""
    with TemporaryDirectory(prefix="metaswarm-import-", dir=folder) as scratch:
        source = write_large(Path(scratch, "large.gguf"), size_bytes)
        return {"machine": describe_machine(), **watched_import(source, Path(scratch, "cache"))}


def watched_import(source: Path, cache: Path, *options: str) -> dict[str, Any]:
    """Import a file into a cache, and return what that takes.

    `tried`: the modules of child processes that tried the architecture out.
    """
    cache.mkdir()
    command = python("-m", "node", "model", "import", str(source), "--cache-dir", str(cache), *options)
    alone_bytes = together_bytes = stored_bytes = 0
    tried: set[str] = set()
    began_s = time.perf_counter()
    with running(command, what="the import") as child:
        while child.process.poll() is None:
            own, all_of_them = memory_of(child.process.pid)
            alone_bytes, together_bytes = max(alone_bytes, own), max(together_bytes, all_of_them)
            stored_bytes = max(stored_bytes, folder_bytes(cache))
            tried |= _trials(child.process.pid)
            time.sleep(POLL_S)
        child.check()
    took_s = time.perf_counter() - began_s
    file_bytes = source.stat().st_size
    return {
        "file_gb": file_bytes / 1e9,
        "memory_alone_mib": alone_bytes / MIB,
        "memory_together_mib": together_bytes / MIB,
        "disk_over_file": stored_bytes / file_bytes,
        "took_s": took_s,
        "gb_per_s": file_bytes / 1e9 / took_s,
        "tried": sorted(tried),
    }


def memory_of(pid: int) -> tuple[int, int]:
    """Return the proportional set size of a process, and of it with all its children."""
    sizes = []
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                sizes.append(each.memory_full_info().pss)
    return (sizes[0], sum(sizes)) if sizes else (0, 0)


def _trials(pid: int) -> set[str]:
    found: set[str] = set()
    with suppress(psutil.Error):
        for each in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                found |= {
                    word for word in each.cmdline() if word.startswith("node.engine.") and "tokenizer" not in word
                }
    return found


def report(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    alone, together = result["memory_alone_mib"], result["memory_together_mib"]
    target = f"at most {TARGET_MIB:.0f}: {verdict(together, TARGET_MIB)}"
    return (
        f"imported {result['file_gb']:.2f} GB in {result['took_s']:.1f} s ({result['gb_per_s']:.2f} GB/s)\n"
        f"memory of the command {alone:.0f} MiB, with its children {together:.0f} MiB ({target})\n"
        f"disk: {result['disk_over_file']:.3f} times the file"
    )


if __name__ == "__main__":
    main()
