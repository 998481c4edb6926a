"""Agreed cells have full weight; free reports count by reputation, unless they contradict the table."""

from protocol.consensus_values import Cell
from protocol.identity import PeerId
from selector.consensus.evidence import FREE_WEIGHT, HINT_WEIGHT, Evidence, evidence_of
from selector.consensus.table import AgreedCell

FIRM, HINT, OPEN = (Cell("two cores", "short", name) for name in ("firm", "hint", "open"))
TABLE = {FIRM: AgreedCell(-500_000, 5, firm=True), HINT: AgreedCell(250_000, 1, firm=False)}


def test_agreed_cells_are_weighted_by_support() -> None:
    assert evidence_of(TABLE, [], {}) == [Evidence(FIRM, -0.5, 1.0), Evidence(HINT, 0.25, HINT_WEIGHT)]


def test_free_reports_are_weighted_by_reputation() -> None:
    readings = {"honest": -1.0, "liar": 5.0, "newcomer": -1.1, "stranger": 9.0}
    reports = [(PeerId(name), OPEN, log_ratio) for name, log_ratio in readings.items()]
    found = evidence_of({}, reports, {"honest": 2000, "liar": 0, "newcomer": 500})
    assert found == [Evidence(OPEN, -1.0, FREE_WEIGHT), Evidence(OPEN, -1.1, FREE_WEIGHT / 4)]


def test_reports_that_contradict_the_table_are_ignored() -> None:
    reports = [(PeerId("honest"), FIRM, -0.6), (PeerId("honest"), FIRM, 0.5)]
    assert evidence_of(TABLE, reports, {"honest": 1})[2:] == [Evidence(FIRM, -0.6, FREE_WEIGHT)]
