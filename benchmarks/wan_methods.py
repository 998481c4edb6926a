"""Speed-up of methods that save round trips on slow links: real daemons behind relays.

    python -m benchmarks.wan_methods [--delay-ms 20] [--rounds N] [--case NAME …] [--json]

Three stages on loopback, each pair connected through `benchmarks.link`. Chunked prefill: time to first token of a
prompt of 1,024. Speculative decoding: tokens per second on repetitive text. Prefix caching: eight jobs that share 90 %
of 400 tokens, their computing, on links without delay. Method and baseline alternate, as in `metaswarm bench`.
"""

import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import click
import httpx
import trio

from benchmarks.common import demo_package, describe_machine
from benchmarks.daemons import Daemon
from benchmarks.link import LinkShape
from benchmarks.wan import distant_daemons
from node.evaluation.paired_stats import Speedup, speedup_of
from node.models.catalogue import DEMO_MODEL
from selector.task import parse_method

STAGES: Final = ("0-10", "10-20", "20-30")


@dataclass(frozen=True, slots=True)
class Case:
    """A method on a workload, and its target speed-up over the baseline."""

    method: str
    workload: dict[str, float]
    objective: str
    target: float
    delayed: bool = True


SHARED: Final = {"concurrency": 8, "prompt_tokens": 400, "max_tokens": 1, "shared_prefix_share": 0.9}

CASES: Final = {
    "chunked prefill": Case("prefill_chunk=128", {"prompt_tokens": 1024, "max_tokens": 1}, "latency", 1.5),
    "speculation": Case(
        "speculation=ngram-4", {"prompt_tokens": 128, "max_tokens": 64, "repetitiveness": 0.9}, "latency", 2.0
    ),
    "prefix cache": Case("prefix_cache=on", SHARED, "throughput", 2.5, delayed=False),
}


@click.command()
@click.option("--delay-ms", type=click.FloatRange(0), default=20.0, show_default=True, help="One way.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--case", "names", type=click.Choice(list(CASES)), multiple=True, help="Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(delay_ms: float, rounds: int, names: Sequence[str], as_json: bool) -> None:
    """Measure chunked prefill, speculation and prefix caching over three stages."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    demo_package()
    result = trio.run(measure, delay_ms / 1000, rounds, names or list(CASES))
    click.echo(json.dumps(result) if as_json else report(result))


async def measure(delay_s: float, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Return the log ratios of each method's cost to that of its comparison, round by round."""
    machine = describe_machine()
    found = []
    for delayed in (True, False):
        cases = [name for name in names if CASES[name].delayed is delayed]
        if cases:
            async with stages(delay_s if delayed else 0.0) as first:
                found += [await _measure(first, rounds, name) for name in cases]
    return {**machine, "delay_s": delay_s, "cases": found}


async def _measure(first: Daemon, rounds: int, name: str) -> dict[str, Any]:
    case = CASES[name]
    package_format = demo_package().manifest.format
    methods = list(dict.fromkeys(parse_method(each, package_format).name for each in (case.method, "baseline")))
    body = {"model": DEMO_MODEL, "methods": methods, "workload": case.workload, "rounds": rounds}
    async with httpx.AsyncClient(base_url=first.ready.api_url, timeout=None) as client:
        answer = await client.post("/swarm/bench", json=body)
    if answer.is_error:
        raise click.ClickException(answer.json()["error"]["message"])
    tried = {each["method"]: each for each in (*answer.json()["methods"], answer.json()["baseline"])}
    for each in tried.values():
        if each["error"]:
            raise click.ClickException(f"{each['method']}: {each['error']}")
    one, other = (tried[name]["log_ratios"][case.objective] for name in methods)
    return {
        "case": name,
        "method": case.method,
        "target": case.target,
        "log_ratios": [first - second for first, second in zip(one, other, strict=True)],
        "tried": tried,
    }


@asynccontextmanager
async def stages(delay_s: float) -> AsyncIterator[Daemon]:
    """Run the stages inside the block, each dialling those before it through a relay; yield the first."""
    flags = [("--serve", f"{DEMO_MODEL}:{span}", "--threads", "1") for span in STAGES]
    async with distant_daemons(flags, LinkShape(delay_s=delay_s)) as daemons:
        yield daemons[0]


def report(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    delay_ms = 1e3 * result["delay_s"]
    lines = [
        f"load average {result['load_average']:.1f} on {result['cores']} cores; links of {delay_ms:.0f} ms each way",
        "",
        "case                          method                                speed-up (95 %)         target",
    ]
    for case in result["cases"]:
        speedup: Speedup = speedup_of(case["log_ratios"])
        interval = f"{speedup.mean:.2f}"
        if speedup.is_bounded:
            interval += f" ({speedup.low:.2f} to {speedup.high:.2f})"
        verdict = "met" if speedup.mean >= case["target"] else "missed"
        lines.append(f"{case['case']:<28}  {case['method']:<36}  {interval:<22}  {case['target']:.1f}  {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
