"""Agreed cells have full weight; free observations count by reputation, unless they contradict the table."""

from dataclasses import replace
from typing import Any

import pytest

from protocol.consensus_values import Cell
from protocol.forms import Digest
from protocol.measurements import ObservationKind
from protocol.stage_facts import DeviceKind, StageFacts
from selector.consensus.table import AgreedCell
from selector.evidence import AGREED, HINT_WEIGHT, AgreedTable, contexts_of_cells, weigh
from selector.prediction import train
from selector.sample import Sample
from selector.task import BASELINE, TaskContext, method
from selector.task_buckets import Viewpoint
from selector.workloads import WORKLOADS

HARDWARE, MODEL = "two cores", "ab" * 32
WORKLOAD, *OTHERS = WORKLOADS
FUSED, ONNX = method(engine="fused").name, method(engine="onnxruntime").name
CONTEXT = TaskContext(
    architecture="llama",
    block_count=30,
    hidden_size=576,
    weight_bytes=500_000_000,
    hardware=HARDWARE,
    **WORKLOADS[WORKLOAD].task,
)
VIEWPOINT = Viewpoint(
    peer="me", hardware=HARDWARE, software="1", hour=100, trust={MODEL: {"honest": 1.0}}, default_trust={MODEL: 0.0}
)


def table(*cells: tuple[str, float, int, bool], digest: int = 1) -> AgreedTable:
    """Return a table of cells (method, log ratio, support, firm) under the first workload."""
    found = {
        Cell(HARDWARE, WORKLOAD, name): AgreedCell(round(ratio * 1e6), support, firm)
        for name, ratio, support, firm in cells
    }
    return AgreedTable(model=MODEL, epoch=7, digest=Digest(bytes([digest]) * 32), cells=found)


def sample(observer: str, name: str = FUSED, log_ratio: float | None = -0.5, **changes: Any) -> Sample:
    kind = ObservationKind.SERVED if log_ratio is None else ObservationKind.BENCH
    at = {
        "kind": kind,
        "context": CONTEXT,
        "route": "r",
        "hour": 100,
        "software": "1",
        "countersigned": True,
        **changes,
    }
    return Sample(model=MODEL, observer=observer, method=name, log_cost=log_ratio or 0.0, log_ratio=log_ratio, **at)


def reading(observer: str, log_ratio: float = -0.5, **changes: Any) -> Sample:
    """Return an assigned measurement, on three stages unless changed."""
    context = replace(CONTEXT, stage_count=3)
    return sample(observer, log_ratio=log_ratio, **{"kind": ObservationKind.ASSIGNED, "context": context, **changes})


def weights(agreed: AgreedTable, *samples: Sample) -> dict[tuple[str, float | None], float]:
    """Return the weight of each piece of evidence by observer and ratio."""
    contexts = dict.fromkeys(agreed.cells, CONTEXT)
    return {(each.observer, each.log_ratio): weight for each, weight in weigh(samples, VIEWPOINT, [(agreed, contexts)])}


def test_cells_of_other_hardware_count_by_how_many_members_have_it() -> None:
    own = table((FUSED, -0.5, 5, True))
    cells = {Cell(name, WORKLOAD, FUSED): AgreedCell(0, 3, firm=True) for name in ("usual", "made up")}
    agreed = replace(own, cells={**own.cells, **cells}, members={HARDWARE: 4, "usual": 30, "made up": 3})
    contexts = {cell: replace(CONTEXT, hardware=cell.hardware) for cell in agreed.cells}
    found = {each.sample.context.hardware: each.weight for each in weigh([], VIEWPOINT, [(agreed, contexts)])}
    assert found == {HARDWARE: 1.0, "usual": pytest.approx(0.3), "made up": pytest.approx(0.03)}


def test_firm_cells_have_full_weight_and_hints_by_support() -> None:
    found = weights(table((FUSED, -0.5, 5, True), (ONNX, 0.25, 2, False)))
    assert found == {(AGREED, -0.5): 1.0, (AGREED, 0.25): pytest.approx(2 * HINT_WEIGHT)}
    assert 3 * HINT_WEIGHT < 0.5


def test_free_observations_count_by_reputation_and_only_where_they_agree() -> None:
    agreed = table((FUSED, -0.5, 5, True))
    found = weights(
        agreed, sample("honest", log_ratio=-0.6), sample("honest", log_ratio=0.4), sample("liar", log_ratio=-0.55)
    )
    assert set(found) == {(AGREED, -0.5), ("honest", -0.6)}
    assert found["honest", -0.6] < 1.0
    elsewhere = sample("honest", log_ratio=0.4, context=replace(CONTEXT, hardware="gpu"))
    assert ("honest", 0.4) in weights(agreed, elsewhere)  # the table says nothing of other hardware


def test_lie_about_a_task_much_like_a_cell_is_compared_with_it() -> None:
    agreed = table((FUSED, -0.5, 5, True))
    alike = [replace(CONTEXT, prompt_tokens=91), replace(CONTEXT, max_tokens=20, repetitiveness=0.2)]
    for context in alike:
        assert set(weights(agreed, sample("honest", log_ratio=0.4, context=context))) == {(AGREED, -0.5)}
        assert len(weights(agreed, sample("honest", log_ratio=-0.4, context=context))) == 2
    for context in (replace(CONTEXT, prompt_tokens=2000), replace(CONTEXT, shared_prefix_share=0.9)):
        assert len(weights(agreed, sample("honest", log_ratio=0.4, context=context))) == 2


def free(observers: int, reports: int) -> list[Sample]:
    """Return reports of many observers on a task that the table says nothing of."""
    elsewhere = replace(CONTEXT, prompt_tokens=4000)
    return [sample(f"peer {i}", log_ratio=0.4, context=elsewhere) for i in range(observers) for _ in range(reports)]


def foreign_weight(agreed: AgreedTable, viewpoint: Viewpoint, samples: list[Sample]) -> float:
    found = weigh(samples, viewpoint, [(agreed, dict.fromkeys(agreed.cells, CONTEXT))])
    return sum(each.weight for each in found if each.sample.observer not in {AGREED, "me"})


def test_strangers_count_together_as_one_peer() -> None:
    strangers = replace(VIEWPOINT, default_trust={MODEL: 0.5})
    assert foreign_weight(table((FUSED, -0.5, 5, True)), strangers, free(100, 50)) == pytest.approx(10)


def test_members_of_the_chain_of_another_model_count_as_strangers() -> None:
    """Whoever is there founds a chain: eight liars may have one of their own."""
    of_model = {"honest": 1.0, "other": 1.0}
    viewpoint = replace(
        VIEWPOINT,
        trust={MODEL: of_model, "another model": {f"peer {i}": 1.0 for i in range(8)}},
        default_trust={MODEL: 0.3, "another model": 1.0},
    )
    elsewhere = replace(CONTEXT, prompt_tokens=4000)
    honest = [sample(name, log_ratio=0.1, context=elsewhere) for name in of_model for _ in range(50)]
    samples = [*honest, *free(8, 50)]
    found = weigh(samples, viewpoint)
    of_honest = sum(each.weight for each in found if each.sample.observer in of_model)
    assert of_honest == pytest.approx(20)
    assert sum(each.weight for each in found) - of_honest == pytest.approx(10)
    unfollowed = weigh([replace(each, model="a third") for each in samples], viewpoint)
    assert sum(each.weight for each in unfollowed) == pytest.approx(10), "of its model nobody is known"
    far = replace(CONTEXT, stage_count=3, link_s=5.0)
    readings = [reading("honest"), *(reading(f"peer {i}", hour=101, context=far) for i in range(8))]
    [context] = contexts_of_cells(table((FUSED, -0.5, 5, True)), readings, viewpoint).values()
    assert context.link_s == 0


def test_reports_of_others_never_outweigh_what_was_agreed() -> None:
    names = [method(engine="fused", prefill_chunk=chunk).name for chunk in ("64", "256")] + [FUSED]
    cells = {Cell(HARDWARE, workload, name): AgreedCell(0, 5, firm=True) for workload in WORKLOADS for name in names}
    agreed = replace(table(), cells=cells)
    members = replace(VIEWPOINT, trust={MODEL: {f"peer {i}": 1.0 for i in range(10)}})
    assert foreign_weight(agreed, members, free(10, 100)) == pytest.approx(len(cells))
    assert foreign_weight(table(), members, free(10, 100)) == pytest.approx(100)  # nothing is agreed
    own = [sample("me") for _ in range(60)]
    assert foreign_weight(agreed, members, [*own, *free(10, 100)]) == pytest.approx(60)


def test_own_measurement_counts_against_the_table() -> None:
    assert weights(table((FUSED, -0.5, 5, True)), sample("me", log_ratio=0.4))["me", 0.4] == 1.0


def test_readings_that_made_a_cell_do_not_count_again() -> None:
    firm, hint = table((FUSED, -0.5, 5, True)), table((FUSED, -0.5, 2, False))
    readings = [reading("honest", -0.5), reading("me", -0.45)]
    assert set(weights(firm, *readings)) == {(AGREED, -0.5)}
    assert set(weights(hint, *readings)) == {(AGREED, -0.5), ("me", -0.45)}
    assert weights(firm, reading("me", 0.4))["me", 0.4] == 1.0  # this machine is not like the others
    assert ("honest", -0.5) in weights(table((ONNX, -0.5, 5, True)), *readings)  # not of this cell


@pytest.mark.parametrize(
    "lie",
    [
        sample("honest", log_ratio=0.4, context=replace(CONTEXT, architecture="LLaMA")),
        sample("honest", "speculation=off|engine=fused", log_ratio=0.4),
        sample("honest", log_ratio=None),  # with a second job, of another method, it would have a ratio
    ],
    ids=["architecture", "method", "served"],
)
def test_other_spelling_or_lack_of_a_ratio_escapes_no_agreed_cell(lie: Sample) -> None:
    agreed = table((FUSED, -0.5, 5, True))
    assert set(weights(agreed, lie)) == {(AGREED, -0.5)}
    assert len(weights(agreed, replace(lie, observer="me"))) == 2


def test_cells_take_the_route_of_the_history_and_the_workload_of_their_own() -> None:
    cell = Cell(HARDWARE, OTHERS[0], FUSED)
    agreed = AgreedTable(model=MODEL, epoch=1, digest=Digest(bytes(32)), cells={cell: AgreedCell(0, 3, firm=True)})
    known = reading("honest", context=replace(CONTEXT, stage_count=3, link_s=0.5, transfer_s=0.96))
    found = contexts_of_cells(agreed, [known], VIEWPOINT)[cell]
    assert (found.stage_count, found.link_s) == (3, 0.5)
    assert (found.prompt_tokens, found.max_tokens) == (512, 8)
    assert found.transfer_s == pytest.approx(0.96 * (512 + 8) / (64 + 32))
    assert not contexts_of_cells(agreed, [replace(known, model="other")], VIEWPOINT)


def test_only_members_say_where_agreed_cells_were_measured_and_our_own_word_is_first() -> None:
    agreed = table((FUSED, -0.5, 5, True))
    odd: dict[str, Any] = {"hour": 101, "context": replace(CONTEXT, stage_count=9)}
    strangers = [reading("liar", **odd), sample("honest", **odd), reading("honest", countersigned=False, **odd)]

    def stage_counts(*samples: Sample) -> list[int]:
        viewpoint = replace(VIEWPOINT, trust={MODEL: {"honest": 1.0, "newcomer": 0.1}})
        return [each.stage_count for each in contexts_of_cells(agreed, samples, viewpoint).values()]

    assert stage_counts(*strangers) == []
    assert stage_counts(reading("honest"), *strangers) == [3]
    assert stage_counts(reading("honest"), reading("newcomer", **odd)) == [3]
    assert stage_counts(reading("me", hour=1), reading("honest", **odd)) == [3]


def test_own_context_is_not_mixed_with_those_of_others_on_the_same_kind_of_route() -> None:
    agreed = table((FUSED, -0.5, 5, True))
    own = reading("me", hour=1, context=replace(CONTEXT, link_s=0.5))
    others = [reading(name, hour=101, context=replace(CONTEXT, link_s=0.1)) for name in ("honest", "other")]
    viewpoint = replace(VIEWPOINT, trust={MODEL: {"honest": 1.0, "other": 1.0}})
    assert {each.link_s for each in contexts_of_cells(agreed, [own, *others], viewpoint).values()} == {0.5}


def test_context_of_a_cell_is_what_members_have_in_the_middle() -> None:
    def facts(memory_read_bytes_per_s: float, **changes: Any) -> StageFacts:
        known: dict[str, Any] = {"blocks": 30, "device": DeviceKind.CPU, "memory_bytes": 1 << 34, "threads": 2}
        return StageFacts(**{**known, "memory_read_bytes_per_s": memory_read_bytes_per_s, **changes})

    def told(observer: str, each: StageFacts, **changes: Any) -> Sample:
        return reading(observer, context=replace(CONTEXT, stage_facts=(each,), **changes), hour=101)

    agreed = table((FUSED, -0.5, 5, True))
    honest = [told("honest", facts(20e9)), told("other", facts(21e9)), told("third", facts(22e9, threads=4))]
    lies = [told("liar", facts(1.0, memory_bytes=1)), told("second liar", facts(1e15), link_s=9.0, stage_count=9)]
    trust = {"honest": 0.8, "other": 0.7, "third": 0.9, "liar": 1.0, "second liar": 1.0}
    [found] = contexts_of_cells(agreed, [*honest, *lies], replace(VIEWPOINT, trust={MODEL: trust})).values()
    assert (found.stage_count, found.link_s) == (1, 0.0)
    assert found.stage_facts == (facts(20e9),)


def best(agreed: AgreedTable, *samples: Sample) -> str:
    """Return the method that a model learned from a table prefers in the cells' own context."""
    predictor = train(samples, VIEWPOINT, [agreed])
    assert predictor is not None
    assert predictor.learned_from == {MODEL: {cell.hardware for cell in agreed.cells}}
    predicted = predictor.table(CONTEXT)
    return min((FUSED, ONNX, BASELINE.name), key=lambda name: predicted[name].log_cost)


def test_another_table_changes_the_predicted_best() -> None:
    known = [reading("me", 0.0, name=BASELINE.name, context=CONTEXT) for _ in range(5)]  # where, and nothing else
    others = [(method(engine="fused", prefill_chunk=chunk).name, 0.5, 5, True) for chunk in ("64", "128", "256")]
    for winner, loser in ((FUSED, ONNX), (ONNX, FUSED)):
        assert best(table((winner, -2.0, 5, True), (loser, 1.0, 5, True), *others), *known) == winner


def test_made_up_hardware_with_the_figures_of_this_one_does_not_change_the_predicted_best() -> None:
    known = [reading("me", 0.0, name=BASELINE.name, context=CONTEXT) for _ in range(5)]
    told = [reading("honest", 0.0, name=BASELINE.name, context=replace(CONTEXT, hardware="made up"))]
    truth = {FUSED: -1.5, ONNX: 0.5, **{method(engine="fused", prefill_chunk=c).name: 0.2 for c in ("64", "128")}}
    lies = {name: {FUSED: 1.0, ONNX: -3.0}.get(name, ratio) for name, ratio in truth.items()}
    agreed = replace(
        table(*((name, ratio, 3, True) for name, ratio in truth.items())), members={HARDWARE: 7, "made up": 3}
    )
    made_up = {
        Cell("made up", workload, name): AgreedCell(round(ratio * 1e6), 3, firm=True)
        for workload in WORKLOADS
        for name, ratio in lies.items()
    }
    assert best(replace(agreed, cells={**agreed.cells, **made_up}), *known, *told) == FUSED


def test_new_hardware_goes_by_what_all_other_hardware_has_ahead() -> None:
    def of(other_s_ratio: float) -> AgreedTable:
        found, elsewhere = table((FUSED, -0.5, 3, True)), Cell("other", WORKLOAD, FUSED)
        agreed = AgreedCell(round(other_s_ratio * 1e6), 3, firm=True)
        return replace(found, cells={**found.cells, elsewhere: agreed})

    assert of(-0.3).is_ahead(FUSED, BASELINE.name, "new", WORKLOAD)
    assert not of(-0.1).is_ahead(FUSED, BASELINE.name, "new", WORKLOAD), "readings of one value differ as much"
    assert not of(0.1).is_ahead(FUSED, BASELINE.name, "new", WORKLOAD)
    assert of(0.1).is_ahead(FUSED, BASELINE.name, HARDWARE, WORKLOAD), "what is measured of a class decides for it"
    assert not of(-0.3).is_ahead(ONNX, BASELINE.name, "new", WORKLOAD), "there is no measurement of it"
    assert not table().is_ahead(FUSED, BASELINE.name, "new", WORKLOAD)


def test_hardware_with_hints_alone_does_not_go_by_other_hardware() -> None:
    found, hint = table((FUSED, -0.5, 3, True)), Cell("other", WORKLOAD, FUSED)
    agreed = replace(found, cells={**found.cells, hint: AgreedCell(round(0.3e6), 1, firm=False)})
    firm = agreed.firm_part({HARDWARE})
    assert firm.is_ahead(FUSED, BASELINE.name, "new", WORKLOAD)
    assert not firm.is_ahead(FUSED, BASELINE.name, "other", WORKLOAD), "its own readings say otherwise"
