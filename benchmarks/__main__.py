"""Runs the benchmarks one after another; above each table stands the command that prints it.

    python -m benchmarks [--all | --list] [NAME …]

Without arguments it runs those that take minutes; with `--all` all that need no arguments, which takes hours. A
benchmark that fails does not stop the others.
"""

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

QUICK = ("hop", "ping", "memory", "connections", "flood", "spread")
LONG = (
    *("crash", "mutations", "growth", "failover", "churn", "wan", "joining", "pipeline", "wan_methods", "selector"),
    *(
        "batching",
        "idle",
        "engine",
        "methods",
        "learning",
        "first_minutes",
        "budget",
        "placement",
        "paths",
        "architectures",
        "resident",
        "gguf_import",
        "eight_billion",
        "hub_import",
        "llamacpp",
        "structured_texts",
        "relay",
        "clients",
    ),
)
WITH_ARGUMENTS = {"consensus": "DATASET_DIR", "trace": "FILE", "link": "HOST:PORT"}
"""Benchmarks that need arguments."""


def main() -> int:
    """Run the benchmarks named on the command line; return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*QUICK, *LONG))}")
    parser.add_argument("--all", action="store_true", help="run them all")
    parser.add_argument("--list", action="store_true", help="list what each measures, and run none")
    options = parser.parse_args()
    if unknown := set(options.names) - {*QUICK, *LONG}:
        parser.error(f"unknown benchmark {min(unknown)!r}, or one that needs arguments; --list names them all")
    if options.list:
        show()
        return 0
    failed = run(options.names or ((*QUICK, *LONG) if options.all else QUICK))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def show() -> None:
    """Print the command and the first line of the docstring of each."""
    for name in (*QUICK, *LONG, *WITH_ARGUMENTS):
        # Read, not imported: some import torch.
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(source)) or ""
        command = " ".join(filter(None, (f"python -m benchmarks.{name}", WITH_ARGUMENTS.get(name))))
        print(f"{command}{'' if name in QUICK else '  (not by default)'}\n    {said.partition(chr(10))[0]}")


def run(names: tuple[str, ...] | list[str]) -> list[str]:
    """Run the benchmarks of these names; return those that failed."""
    began_s = time.monotonic()
    failed = []
    for name in names:
        print(f"$ python -m benchmarks.{name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
        print(flush=True)
    print(f"took {time.monotonic() - began_s:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
