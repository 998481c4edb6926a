"""Cost of the methods that a swarm learns from an empty history, against the best in hindsight.

Three daemons serve mixed jobs of four families, in turn or in an order that `--seed` decides; two of the families
demand exact outputs. The submitter has measured beforehand how lossy methods change the model's answers. Then the best
method of each family and the best single method are determined in hindsight, by a few jobs of each family with each
method that was used. Finally the last jobs are replayed in alternation: with the methods that the swarm now chooses,
with those of the hand-written rule, and with those two. Also told are the kinds of tasks that the families came to, the
concurrency recorded for this serial client, how much longer jobs took beside a trial's, and by how much trials overdrew
their allowance.

With `--replays 0` that is all, and there is no hindsight.

`python -m benchmarks.learning [--jobs 300] [--last N] [--replays 5] [--exact] [--seed N] [--plot FILE.png] [--json]`
"""

import argparse
import itertools
import json
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import psutil
import trio

from benchmarks.common import demo_package, describe_machine, whole_model
from node.cli.explain import short_method as short
from node.config import NodeReady
from node.models.catalogue import DEMO_MODEL
from node.models.sample import sample_text
from node.selection.samples import read_samples
from node.storage.database import DATABASE_FILE
from protocol.measurements import ObservationKind
from selector.heuristic import preference
from selector.task import PORTFOLIO, Method, TaskContext
from selector.task_buckets import task_bucket

BOOTSTRAPS: Final = 2000
JUDGE_LIMIT_S: Final = 1800.0
SCOUTS: Final = 5
"""Jobs of each family by which hindsight compares methods."""

CONTENDERS: Final = 4
"""Methods of each family that hindsight looks at: the most used ones."""

_SERIALS: Final = itertools.count(1000)

FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "short question": {"prompt_words": 24, "max_tokens": 48, "quality": "any"},
    "long prompt": {"prompt_words": 360, "max_tokens": 2, "quality": "any"},
    "shared prefix": {"prompt_words": 30, "common_words": 240, "max_tokens": 6, "quality": "exact"},
    "copying": {"prompt_words": 12, "repeats": 8, "max_tokens": 32, "quality": "exact"},
}


def body_of(family: str, number: int, method: str = "auto") -> dict[str, Any]:
    """Return the request of one job of a family; the same number asks the same, under a serial number of its own.

    So no job finds its own prompt in a cache from when it was served before: what prompts share is the family's.
    """
    shape = FAMILIES[family]
    words = sample_text().split()
    rng = random.Random(f"{family} {number}")

    def some(count: int) -> str:
        start = rng.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    prompt = some(shape["prompt_words"])
    serial = next(_SERIALS)
    if "common_words" in shape:
        prompt = " ".join(words[: shape["common_words"]]) + f" {serial} " + prompt
    elif "repeats" in shape:
        prompt = " ".join([f"{serial} {prompt}."] * shape["repeats"])
    else:
        prompt = f"{serial} {prompt}"
    extras = {"quality": shape["quality"], "method": method, "ignore_eos": True}
    common = {"model": DEMO_MODEL, "max_tokens": shape["max_tokens"], "temperature": 0, "metaswarm": extras}
    return {**common, "prompt": prompt}


def in_exact(body: dict[str, Any]) -> dict[str, Any]:
    """Return the request with exact outputs."""
    return {**body, "metaswarm": {**body["metaswarm"], "quality": "exact"}}


async def serve(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """Run a job; return its field `metaswarm`."""
    while True:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        await trio.sleep(1.0)
    document: dict[str, Any] = answer.raise_for_status().json()["metaswarm"]
    return document


async def judge(client: httpx.AsyncClient) -> None:
    """Measure the effect of lossy methods on the model's answers, as a node does once when idle."""
    await serve(client, body_of(next(family for family, shape in FAMILIES.items() if shape["quality"] == "any"), 0))
    with trio.move_on_after(JUDGE_LIMIT_S):
        while not any(model["quality"] for model in (await client.get("/swarm/models")).json()["models"]):
            await trio.sleep(1)
        return
    raise SystemExit(f"what lossy methods do to the model was not known after {JUDGE_LIMIT_S:.0f} s")


def order_of(jobs: int, seed: int | None) -> list[str]:
    """Return the family of each job: in turn, or every four in an order of their own that a seed decides."""
    names, rng = list(FAMILIES), random.Random(seed)
    turns = [names if seed is None else rng.sample(names, len(names)) for _ in range(-(-jobs // len(names)))]
    return list(itertools.chain.from_iterable(turns))[:jobs]


async def measure(jobs: int, last: int, replays: int, *, exact: bool, seed: int | None = None) -> dict[str, Any]:
    """Return the figures. `exact`: all families demand exact outputs, so that no method has to be judged."""
    package = demo_package()
    names, order = list(FAMILIES), order_of(jobs, seed)
    if exact:
        for shape in FAMILIES.values():
            shape["quality"] = "exact"
    else:
        async with whole_model(package, 1) as ready, httpx.AsyncClient(base_url=ready.api_url, timeout=600) as client:
            await judge(client)  # kept in the cache folder; what else these peers have learned is gone with them
    async with whole_model(package, 3) as ready, httpx.AsyncClient(base_url=ready.api_url, timeout=600) as client:
        learning = [await _learn_from(client, family, number) for number, family in enumerate(order)]
        contexts = _served(ready)
        status = (await client.get("/swarm/status")).raise_for_status().json()["selection"]
        told_anyway = {
            **describe_machine(),
            "jobs": jobs,
            "selection": status,
            "learning": learning,
            "kinds": dict(Counter(map(task_bucket, contexts))),
            "concurrency": dict(Counter(context.concurrency for context in contexts)),
            "beside_trials": _beside(learning),
            "overdraft_s": max(0.0, *(-each["budget_left_s"] for each in learning)),
        }
        if not replays:
            return told_anyway
        rules = {family: (await _rule(client, family)).name for family in names}
        best, single = await _hindsight(client, _contenders(learning, rules), jobs)
        ways = {
            "swarm": dict.fromkeys(names, "auto"),
            "rule": rules,
            "best in hindsight": best,
            "single best": dict.fromkeys(names, single),
        }
        costs: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        rng = random.Random(1)
        for _ in range(replays):
            for number in range(jobs - last, jobs):
                family = order[number]
                told: dict[str, float] = {}
                for method in _shuffled({way[family] for way in ways.values()}, rng):
                    told[method] = _told(await serve(client, body_of(family, number, method)))["total_s"]
                for name, way in ways.items():
                    costs[name][number].append(told[way[family]])
        return {
            **told_anyway,
            "last": last,
            "rule": rules,
            "best": best,
            "single_best": single,
            "ratios": _ratios(costs),
            "costs": costs,
        }


async def _learn_from(client: httpx.AsyncClient, family: str, number: int) -> dict[str, Any]:
    """Serve a job; return how it went, and whether jobs of a trial ran beside it."""
    before = (await client.get("/swarm/status")).raise_for_status().json()["jobs"]["trials"]
    done = await serve(client, body_of(family, number))
    status = (await client.get("/swarm/status")).raise_for_status().json()
    trials = status["jobs"]["trials"]
    beside = bool(before["running"] or trials["running"] or trials["done"] > before["done"])
    left_s = status["selection"]["budget_left_s"]
    return {"family": family, **_told(done), "beside_trial": beside, "budget_left_s": left_s}


def _served(ready: NodeReady) -> list[TaskContext]:
    """Return the contexts of the jobs in a daemon's history that it had served for its users."""
    command = psutil.Process(ready.pid).cmdline()
    database = Path(command[command.index("--data-dir") + 1]) / DATABASE_FILE
    samples = [each for each in read_samples(database) if each.observer == ready.peer_id]
    return [each.context for each in samples if each.kind is ObservationKind.SERVED]


def _beside(learning: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return how many jobs ran beside a trial's, and their times over those of like jobs that did not."""
    alone: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in learning:
        if not each["beside_trial"]:
            alone[each["family"], each["method"]].append(each["total_s"])
    ratios = [
        each["total_s"] / statistics.median(alone[key])
        for each in learning
        if each["beside_trial"] and (key := (each["family"], each["method"])) in alone
    ]
    return {
        "jobs": sum(each["beside_trial"] for each in learning),
        "median": statistics.median(ratios) if ratios else math.nan,
        "mean": statistics.fmean(ratios) if ratios else math.nan,
        "most": max(ratios, default=math.nan),
    }


def _told(done: dict[str, Any]) -> dict[str, Any]:
    selection = done["selection"] or {}
    return {
        "method": done["method"]["name"],
        "total_s": done["timing"]["total_s"],
        "predicted_s": selection.get("predicted_s"),
        "basis": selection.get("basis"),
        "explored": selection.get("explored"),
    }


def _contenders(learning: Sequence[dict[str, Any]], rules: dict[str, str]) -> dict[str, set[str]]:
    """Return the candidates in hindsight: those of each family, and all exact ones for every family."""
    used: dict[str, list[str]] = defaultdict(list)
    for each in learning:
        used[each["family"]].append(each["method"])
    found = {
        family: {name for name, _ in Counter(methods).most_common(CONTENDERS)} | {methods[-1], rules[family]}
        for family, methods in used.items()
    }
    exact = {name for methods in found.values() for name in methods if PORTFOLIO[name].exact}
    return {family: methods | exact for family, methods in found.items()}


async def _hindsight(
    client: httpx.AsyncClient, contenders: dict[str, set[str]], jobs: int
) -> tuple[dict[str, str], str]:
    """Return the best method of each family, and the best for all, by jobs that were not served before."""
    costs: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    rng = random.Random(2)
    for number in range(jobs, jobs + SCOUTS):
        for family, methods in contenders.items():
            for method in _shuffled(methods, rng):
                costs[family][method] += _told(await serve(client, body_of(family, number, method)))["total_s"]
    best = {family: min(by, key=by.__getitem__) for family, by in costs.items()}
    everywhere = set.intersection(*contenders.values())
    return best, min(sorted(everywhere), key=lambda method: sum(by[method] for by in costs.values()))


def _shuffled(names: Iterable[str], rng: random.Random) -> list[str]:
    ordered = sorted(names)
    return rng.sample(ordered, len(ordered))


async def _rule(client: httpx.AsyncClient, family: str) -> Method:
    """Return the hand-written rule's choice for a job."""
    shape = FAMILIES[family]
    words = shape["prompt_words"] * shape.get("repeats", 1) + shape.get("common_words", 0)
    tokens = round(1.4 * words)
    query = {
        "model": DEMO_MODEL,
        "prompt_tokens": tokens,
        "max_tokens": shape["max_tokens"],
        "quality": shape["quality"],
        "shared_prefix_share": round(shape.get("common_words", 0) / words, 2),
        "repetitiveness": 0.8 if "repeats" in shape else 0.0,
    }
    explained = (await client.post("/swarm/explain", json=query)).raise_for_status().json()
    offered = [PORTFOLIO[each["name"]] for each in explained["methods"] if each["votes"] and each["name"] in PORTFOLIO]
    return preference(TaskContext.of(explained["task"]), offered)[0]


def _ratios(costs: dict[str, dict[int, list[float]]]) -> dict[str, dict[str, float]]:
    """Return the cost of the swarm's choices relative to each alternative."""
    mean = {way: [statistics.fmean(of) for of in by.values()] for way, by in costs.items()}
    return {way: _ratio(mean["swarm"], other) for way, other in mean.items() if way != "swarm"}


def _ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return mean cost of the swarm's choices over the other's, with the bootstrap's 95 % interval over jobs."""
    rng = np.random.default_rng(1)
    mine, theirs = np.array(own), np.array(other)
    drawn = rng.integers(0, len(mine), (BOOTSTRAPS, len(mine)))
    ratios = mine[drawn].mean(axis=1) / theirs[drawn].mean(axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return {"ratio": float(mine.mean() / theirs.mean()), "low": float(low), "high": float(high)}


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot the durations of each family's jobs in order of arrival."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for family in FAMILIES:
        points = [(i, each["total_s"]) for i, each in enumerate(found["learning"]) if each["family"] == family]
        axes.plot(*zip(*points, strict=True), ".-", label=family)
    axes.set(xlabel="job", ylabel="seconds", yscale="log", title="Learning which method to use")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--last", type=int, help="jobs that are replayed; default: a third")
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--exact", action="store_true", help="exact outputs only: no method has to be judged before")
    parser.add_argument("--seed", type=int, help="of the order of the families; default: in turn")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    last = options.last or math.ceil(options.jobs / 3)
    found = trio.run(partial(measure, options.jobs, last, options.replays, exact=options.exact, seed=options.seed))
    if options.plot:
        plot(found, options.plot)
    if options.json:
        print(json.dumps(found))
        return
    print(f"load average {found['load_average']:.1f} on {found['cores']:.0f} cores")
    selection = found["selection"]
    print(f"{found['jobs']} jobs; {selection['trials']} trials took {selection['trial_s']:.0f} s")
    beside = found["beside_trials"]
    print(
        f"{len(found['kinds'])} kinds of tasks, concurrency {found['concurrency']}, "
        f"overdraft {found['overdraft_s']:.0f} s"
    )
    print(
        f"{beside['jobs']} jobs beside a trial's took {beside['median']:.2f} times as long as like jobs (median), "
        f"{beside['mean']:.2f} (mean), {beside['most']:.2f} (most)"
    )
    for family, name in found.get("best", {}).items():
        mine = [each["method"] for each in found["learning"] if each["family"] == family]
        print(f"{family:<16} chosen in the end {short(mine[-1])}")
        print(f"{'':<16} the rule's        {short(found['rule'][family])}")
        print(f"{'':<16} best in hindsight {short(name)}")
    if not options.replays:
        return
    print(f"{'every family':<16} best in hindsight {short(found['single_best'])}")
    for name, of in found["ratios"].items():
        print(f"last {found['last']} jobs, cost over {name:<18} {of['ratio']:.3f}  [{of['low']:.3f}, {of['high']:.3f}]")


if __name__ == "__main__":
    main()
