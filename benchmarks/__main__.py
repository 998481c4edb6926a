"""Runs every benchmark of the README: `python -m benchmarks`."""

import subprocess
import sys

BENCHMARKS = ("hop", "ping", "memory")

for name in BENCHMARKS:
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    print(f"\n$ python -m benchmarks.{name}", flush=True)
    subprocess.run(command, check=True)
