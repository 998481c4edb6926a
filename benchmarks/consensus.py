"""Robustness of the agreed table against colluding liars, and the cost of an epoch for a peer.

    python -m benchmarks.consensus DATASET_DIR [--peers N] [--epochs N] [--json]

Simulated peers with the hardware of a dataset measure their assigned cells, through the selector's own epochs.
Colluding liars report the mirror image of the truth in the decisive cells. Meta-models are trained on the agreed table
and choose methods in contexts that were not measured. Baseline: the same number of readings, freely reported. Some
liars are patient: they measure truly what is assigned, and lie in free reports alone.
"""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

import click
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from threadpoolctl import threadpool_limits

from node.consensus.measurement_runner import measurement_plan
from node.evaluation.csv_dataset import read_folder
from protocol.consensus import sign_message
from protocol.consensus_values import (
    VALUE_SCALE,
    Cell,
    Commit,
    Member,
    Reading,
    Reveal,
    Signature,
    Statement,
    commitment_of,
    digest_of,
    genesis_of,
)
from protocol.history import encode_batch
from protocol.identity import PeerId, peer_id_from_public_key
from protocol.measurements import ObservationKind
from selector.consensus import inclusion
from selector.consensus.chain import quorum_size
from selector.consensus.reputation import relative_trust
from selector.consensus.sortition import MeasurementPlan
from selector.consensus.state import Contribution, State, conclude, initial_state
from selector.dataset import Dataset, Pairs, context_minima
from selector.evidence import AgreedTable, weigh
from selector.prediction import fit_model
from selector.sample import Sample
from selector.task import TaskContext
from selector.task_buckets import Viewpoint

GENESIS = genesis_of(b"benchmark", "model", "rules")
NOISE = 0.03
"""Standard deviation of a reading, natural logarithm."""

PROBES = 3
SAMPLED = 2
"""Contexts that are looked at for each that is used: some cannot be, and twins stay together."""

GOSSIP_COPIES = 4
"""How often a peer of a mesh of six to eight neighbours gets the same gossip message, about."""


@dataclass(frozen=True)
class Measurable(MeasurementPlan):
    """The cells of a folder: not every method was measured in every context."""

    measured: tuple[Cell, ...] = ()

    def cells(self, hardware: Iterable[str]) -> tuple[Cell, ...]:
        """Return the cells for some classes of hardware."""
        wanted = {*hardware}
        return tuple(cell for cell in self.measured if cell.hardware in wanted)


@dataclass(frozen=True, slots=True)
class World:
    """Ground truth: training cells with their log ratios, and the contexts in which choices are judged."""

    pairs: Pairs
    """Of all contexts and methods."""
    contexts: Mapping[str, int]
    methods: Mapping[str, int]
    truth: Mapping[Cell, float]
    """Natural logarithm of the ratio to the baseline, of each cell that may be measured."""
    lies: Mapping[Cell, float]
    """The readings of the liars in the cells that decide."""
    test: Dataset


@dataclass(frozen=True, slots=True)
class Row:
    """One way to learn under one share of liars: the mean ratio to the virtual best over contexts never measured."""

    design: str
    liars: float
    ratio: float
    ratio_with_probes: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Cost of one epoch for a peer, when all are members."""

    peers: int
    messages: int
    """Different gossip messages of one epoch, which every peer gets."""
    own_messages: float
    """Of them, sent by one peer, on average."""
    payload_bytes: int
    """Of them all, once."""
    received_bytes: int
    """With the copies that a gossip mesh delivers."""
    conclude_s: float
    """To compute the statement."""


def build_world(folder: Path, train: int, test: int, seed: int) -> World:
    """Return training cells of some contexts, and others to choose in; twins that differ in budget stay together."""
    dataset = read_folder(folder).sample(SAMPLED * (train + test), seed)
    present = np.unique(dataset.pairs.context)
    pairs = replace(
        dataset.pairs,
        contexts=dataset.pairs.contexts.take(present),
        context=np.searchsorted(present, dataset.pairs.context),
    )
    dataset = replace(dataset, pairs=pairs)
    rng = Random(seed)
    baseline = int(np.argmax(np.bincount(pairs.method)))
    costs: dict[int, dict[int, float]] = defaultdict(dict)
    for context, method, cost in zip(pairs.context, pairs.method, dataset.cost, strict=True):
        costs[int(context)][int(method)] = float(cost)
    usable = [context for context, found in sorted(costs.items()) if baseline in found and len(found) > 1]
    ids = pairs.contexts.ids
    groups: dict[str, list[int]] = defaultdict(list)
    for context in usable:
        groups[ids[context].rpartition("/")[0] or ids[context]].append(context)
    names = sorted(groups)
    rng.shuffle(names)
    order = [context for name in names for context in groups[name]]
    hardware = pairs.contexts.names["hardware"]
    truth: dict[Cell, float] = {}
    lies: dict[Cell, float] = {}
    for context in order[:train]:
        found = costs[context]
        ratios = {method: cost - found[baseline] for method, cost in found.items()}
        ranked = sorted(ratios, key=lambda method: ratios[method])
        best, worst = ratios[ranked[0]], ratios[ranked[-1]]
        deciding = {*ranked[:2], *ranked[-2:]}
        for method, ratio in ratios.items():
            cell = Cell(str(hardware[context]), ids[context], pairs.methods[method])
            truth[cell] = ratio
            if method in deciding:
                lies[cell] = best + worst - ratio
    chosen = np.array(sorted(order[-test:]), dtype=np.intp)
    return World(
        pairs=pairs,
        contexts={name: number for number, name in enumerate(ids)},
        methods={name: number for number, name in enumerate(pairs.methods)},
        truth=truth,
        lies=lies,
        test=dataset.of_contexts(chosen),
    )


class Population:
    """Peers of the hardware in a world, some of which collude."""

    def __init__(self, world: World, count: int, liars: float, seed: int, *, patient: bool = False) -> None:
        """`patient`: whether liars measure truly what is assigned, to earn weight for lies in free reports."""
        self.world = world
        self.patient = patient
        self.rng = Random(seed)
        kinds = sorted({cell.hardware for cell in world.truth})
        self.hardware = {PeerId(f"peer-{number:04}"): kinds[number % len(kinds)] for number in range(count)}
        self.liars = {*self.rng.sample(sorted(self.hardware), round(liars * count))}

    def reads(self, peer: str, cell: Cell, *, assigned: bool = False) -> float:
        """Return a peer's reading, true or not."""
        lies = peer in self.liars and not (assigned and self.patient)
        lie = self.world.lies.get(cell) if lies else None
        return (self.world.truth[cell] if lie is None else lie) + self.rng.gauss(0, NOISE)

    def reports(self, each: int) -> list[tuple[PeerId, Cell, float]]:
        """Return the reports of peers that choose their cells freely; liars choose the decisive ones."""
        own: dict[str, list[Cell]] = defaultdict(list)
        deciding: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.world.truth:
            own[cell.hardware].append(cell)
            if cell in self.world.lies:
                deciding[cell.hardware].append(cell)
        found = []
        for peer, kind in self.hardware.items():
            cells = deciding[kind] if peer in self.liars else own[kind]
            found += [(peer, cell, self.reads(peer, cell)) for cell in self.rng.choices(cells, k=each)]
        return found


def agree(population: Population, epochs: int) -> State:
    """Return the state after some epochs to which every peer contributes."""
    plan = Measurable((), (), tuple(sorted(population.world.truth)))
    # 64 newcomers are admitted per epoch; this starts when all are members.
    members = tuple(Member(peer, kind) for peer, kind in sorted(population.hardware.items()))
    state = replace(initial_state(GENESIS), members=members)
    parent = GENESIS
    for epoch in range(epochs):
        assigned: dict[PeerId, list[Cell]] = {peer: [] for peer in population.hardware}
        sortition = state.draw(epoch, plan)
        for cell, peers in sortition.cells.items():
            for peer in peers:
                assigned[peer].append(cell)
        contributions = []
        for peer, cells in assigned.items():
            values = {cell: population.reads(peer, cell, assigned=True) for cell in cells}
            readings = tuple(sorted(Reading(cell, round(value * VALUE_SCALE)) for cell, value in values.items()))
            commit = Commit(GENESIS, epoch, parent, peer, population.hardware[peer], commitment_of(peer, b"", readings))
            contributions.append(Contribution(commit, Reveal(GENESIS, epoch, peer, b"", readings)))
        statement, state = conclude(
            GENESIS,
            parent,
            state,
            sortition,
            epoch=epoch,
            proposer=members[0].peer,
            contributions=contributions,
            equivocators=(),
        )
        parent = statement.id
    return state


def choose(world: World, rows: Sequence[tuple[Cell, float, float]]) -> tuple[float, float]:
    """Return the mean ratio to the virtual best that a meta-model of rows (cell, log ratio, weight) comes to.

    Without probes, and with the best of the PROBES most promising methods once they were measured.
    """
    context = np.array([world.contexts[cell.workload] for cell, _, _ in rows], dtype=np.intp)
    method = np.array([world.methods[cell.method] for cell, _, _ in rows], dtype=np.intp)
    training = Pairs(world.pairs.contexts, world.pairs.methods, context, method)
    model = fit_model(training, np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))
    predicted = model.predict(world.test.pairs)
    of = world.test.pairs.context
    best = context_minima(world.test.cost, of, len(world.contexts))
    order = np.lexsort((predicted, of))
    rank = np.zeros(len(predicted), dtype=np.intp)
    starts = np.flatnonzero(np.diff(of[order], prepend=-1))
    rank[order] = np.arange(len(predicted)) - np.repeat(starts, np.diff(starts, append=len(predicted)))
    ratios = []
    for probes in (1, PROBES):
        tried = rank < probes
        chosen = context_minima(world.test.cost[tried], of[tried], len(world.contexts))
        found = np.isfinite(best)
        ratios.append(float(np.mean(np.exp(best[found] - chosen[found]))))
    return ratios[0], ratios[1]


def compare(world: World, peers: int, liars: float, epochs: int, seed: int) -> list[Row]:
    """Return the results of all designs under one share of liars."""
    reports: list[tuple[PeerId, Cell, float]] = []

    def learned_by(name: str, *, patient: bool) -> tuple[str, list[tuple[Cell, float, float]]]:
        population = Population(world, peers, liars, seed, patient=patient)
        state = agree(population, epochs)
        readings = sum(len(measured.readings) for measured in state.measured.values())
        reports[:] = population.reports(max(1, readings // peers))
        return name, learned_from(state, reports)

    designs: list[Callable[[], tuple[str, Sequence[tuple[Cell, float, float]]]]] = [
        lambda: learned_by("assigned, agreed table", patient=False),
        lambda: ("free reports, pooled", [(cell, log_ratio, 1.0) for _, cell, log_ratio in reports]),
        lambda: ("free reports, cell median", _medians(reports)),
    ]
    designs += [lambda: learned_by("the same, lies in free reports only", patient=True)] if liars else []
    rows = []
    for design in designs:
        began_s = time.perf_counter()
        name, learned = design()
        ratio, probed = choose(world, learned)
        rows.append(Row(name, liars, ratio, probed, time.perf_counter() - began_s))
    return rows


def learned_from(state: State, reports: Sequence[tuple[PeerId, Cell, float]]) -> list[tuple[Cell, float, float]]:
    """Return what a daemon that joins would learn from the agreed table and the free reports, by its own rules."""
    # A context of the folder is no workload of a daemon: each stands for a model, of which there is a table.
    models = {cell.workload for cell in (*state.table, *(cell for _, cell, _ in reports))}
    trust, others = relative_trust(state.weights)
    viewpoint = Viewpoint(
        peer="newcomer",
        hardware="",
        software="",
        hour=0,
        trust=dict.fromkeys(models, trust),
        default_trust=dict.fromkeys(models, others),
    )
    tables, class_sizes = [], Counter(member.hardware for member in state.members)
    for workload in sorted({cell.workload for cell in state.table}):
        cells = {cell: entry for cell, entry in state.table.items() if cell.workload == workload}
        digest = state.table_digest
        table = AgreedTable(model=workload, epoch=state.epoch, digest=digest, cells=cells, members=class_sizes)
        tables.append((table, {cell: TaskContext(hardware=cell.hardware) for cell in cells}))
    evidence = weigh([_sample(cell, log_ratio, peer) for peer, cell, log_ratio in reports], viewpoint, tables)
    return [
        (Cell(sample.context.hardware, sample.model, sample.method), sample.log_ratio, weight)
        for sample, weight in evidence
        if sample.log_ratio is not None
    ]


def _sample(cell: Cell, log_ratio: float, observer: str) -> Sample:
    return Sample(
        kind=ObservationKind.BENCH,
        model=cell.workload,
        context=TaskContext(hardware=cell.hardware),
        method=cell.method,
        log_cost=log_ratio,
        log_ratio=log_ratio,
        observer=observer,
        route="",
        hour=0,
        software="",
        countersigned=False,
    )


def _medians(reports: Sequence[tuple[PeerId, Cell, float]]) -> list[tuple[Cell, float, float]]:
    cells: dict[Cell, list[float]] = defaultdict(list)
    for _, cell, log_ratio in reports:
        cells[cell].append(log_ratio)
    return [(cell, median(values), math.sqrt(len(values))) for cell, values in cells.items()]


def cost_of_epoch(peers: int) -> Cost:
    """Return the cost of an epoch for a peer, from the messages of one epoch."""
    keys = [Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")) for number in range(1, peers + 1)]
    key_of: dict[PeerId, Ed25519PrivateKey] = {
        peer_id_from_public_key(key.public_key().public_bytes_raw()): key for key in keys
    }
    names = sorted(key_of)
    kinds = [f"{cores} cores, AVX-512, 64 GiB, no accelerator" for cores in (4, 8, 16, 32)]
    members = tuple(Member(peer, kinds[number % len(kinds)]) for number, peer in enumerate(names))
    state = replace(initial_state(GENESIS), members=members)
    sortition = state.draw(0, measurement_plan("safetensors"))
    committee = sortition.committee
    readings: dict[PeerId, list[Reading]] = {peer: [] for peer in committee}
    for cell, selected in sortition.cells.items():
        for peer in selected:
            readings.setdefault(peer, []).append(Reading(cell, -500_000))
    batches: list[int] = []
    contributions = []
    for peer, found in readings.items():
        ordered = tuple(sorted(found))
        commit = Commit(GENESIS, 0, GENESIS, peer, "", commitment_of(peer, bytes(32), ordered), tuple(_ids(peer, 8)))
        listed = inclusion.pack(sortition.expected, sortition.expected) if peer in sortition.committee else b""
        reveal = Reveal(GENESIS, 0, peer, bytes(32), ordered, listed)
        contributions.append(Contribution(commit, reveal))
        batches += [_batch(key_of[peer], commit), _batch(key_of[peer], reveal)]
    began_s = time.perf_counter()
    statement, _ = conclude(
        GENESIS, GENESIS, state, sortition, epoch=0, proposer=committee[0], contributions=contributions, equivocators=()
    )
    conclude_s = time.perf_counter() - began_s
    signatures = [Signature(GENESIS, 0, peer, statement.id) for peer in committee]
    batches.append(_batch(key_of[committee[0]], statement, signatures[0]))
    batches += [_batch(key_of[each.peer], each) for each in signatures[1:]]
    assert len(signatures) >= quorum_size(len(committee))
    return Cost(
        peers=peers,
        messages=len(batches),
        own_messages=len(batches) / peers,
        payload_bytes=sum(batches),
        received_bytes=sum(batches) * min(GOSSIP_COPIES, peers - 1),
        conclude_s=conclude_s,
    )


def _batch(key: Ed25519PrivateKey, *values: Commit | Reveal | Statement | Signature) -> int:
    return len(encode_batch([sign_message(value, key).envelope for value in values]))


def _ids(peer: str, count: int) -> list[bytes]:
    return sorted(digest_of(peer, number) for number in range(count))


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--peers", type=click.IntRange(20), default=120, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=150, show_default=True, help="24 cells are assigned in each.")
@click.option("--train", type=click.IntRange(10), default=280, show_default=True, help="Contexts that are measured.")
@click.option("--test", type=click.IntRange(10), default=600, show_default=True, help="Contexts to choose in.")
@click.option("--liars", type=float, multiple=True, default=(0.0, 0.2, 0.3), show_default=True, help="Their share.")
@click.option(
    "--scale", type=int, multiple=True, default=(10, 1000, 10_000), show_default=True, help="Sizes of swarms."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    folder: Path,
    peers: int,
    epochs: int,
    train: int,
    test: int,
    liars: tuple[float, ...],
    scale: tuple[int, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Simulate agreement among peers some of which lie, and count its cost."""
    # More threads than idle cores make boosting many times slower: they wait for one another.
    with threadpool_limits(limits=1):
        _run(folder, peers, epochs, train, test, liars, scale, seed, as_json)


def _run(
    folder: Path,
    peers: int,
    epochs: int,
    train: int,
    test: int,
    liars: Sequence[float],
    scale: Sequence[int],
    seed: int,
    as_json: bool,
) -> None:
    world = build_world(folder, train, test, seed)
    rows = [row for share in liars for row in compare(world, peers, share, epochs, seed)]
    costs = [cost_of_epoch(count) for count in scale]
    if as_json:
        click.echo(json.dumps({"rows": [asdict(row) for row in rows], "scale": [asdict(cost) for cost in costs]}))
    else:
        click.echo(report(rows, costs))


def report(rows: Sequence[Row], costs: Sequence[Cost]) -> str:
    """Return the figures as tables."""
    lines = [f"{'mean ratio to the virtual best':<35} liars   no probes   {PROBES} probes"]
    lines += [
        f"{row.design:<35} {row.liars:4.0%}     {row.ratio:.3f}      {row.ratio_with_probes:.3f}"
        for row in sorted(rows, key=lambda row: (row.design, row.liars))
    ]
    lines += ["", " peers   messages an epoch   own   payload   with copies   statement computed in"]
    lines += [
        f"{cost.peers:6}   {cost.messages:17}   {cost.own_messages:3.1f}   {cost.payload_bytes / 1024:4.0f} KiB   "
        f"{cost.received_bytes / 1024:7.0f} KiB   {cost.conclude_s:.2f} s"
        for cost in costs
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
