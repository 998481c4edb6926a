"""What binds a ballot: the agreed table first, and a peer's own readings only where that says nothing."""

from node.stages.voter import Agreement
from protocol.consensus_values import VALUE_SCALE, Cell
from protocol.identity import PeerId
from selector.consensus.table import AgreedCell
from tests.support.agreement import HARDWARE

LIAR = PeerId("liar")
RATIOS = {"slow": VALUE_SCALE, "fast": -VALUE_SCALE}
CELLS = {Cell(HARDWARE, workload, method): RATIOS[method] for workload in ("long", "short") for method in RATIOS}
AGAINST = [(LIAR, {"slow": -1.0, "fast": 1.0})]


def agreement(*, firm: bool, readings: dict[Cell, int]) -> Agreement:
    table = {cell: AgreedCell(value, 7, firm) for cell, value in CELLS.items()}
    return Agreement(1, b"", b"", {LIAR: 5000}, table, {LIAR: HARDWARE}, {LIAR: readings})


def test_false_readings_do_not_free_a_vote_from_the_agreed_table() -> None:
    false = {cell: -value for cell, value in CELLS.items()}
    assert agreement(firm=True, readings=false).weigh(["slow", "fast"], AGAINST) == (0,)
    assert agreement(firm=False, readings=false).weigh(["slow", "fast"], AGAINST) == (5000,)


def test_own_readings_bind_a_vote_where_nothing_is_agreed() -> None:
    assert agreement(firm=False, readings=CELLS).weigh(["slow", "fast"], AGAINST) == (0,)
