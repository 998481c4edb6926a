"""Runs every benchmark of the README: `python -m benchmarks`. Above each table stands the command that gives it."""

import subprocess
import sys
import time

BENCHMARKS = ("hop", "ping", "memory", "connections", "flood", "spread")

began_s = time.monotonic()
for name in BENCHMARKS:
    print(f"$ python -m benchmarks.{name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    print(flush=True)
print(f"took {time.monotonic() - began_s:.0f} s")
