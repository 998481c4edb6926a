"""What is agreed counts for most; who was found out counts for nothing, and so does what contradicts the table."""

from selector.consensus.evidence import FREE_WEIGHT, HINT_WEIGHT, Evidence, evidence_of
from selector.consensus.table import Entry
from selector.consensus.values import Cell

FIRM, HINT, OPEN = (Cell("two cores", "short", name) for name in ("firm", "hint", "open"))
TABLE = {FIRM: Entry(-500_000, 5, firm=True), HINT: Entry(250_000, 1, firm=False)}


def test_the_agreed_table_counts_by_its_support() -> None:
    assert evidence_of(TABLE, [], {}) == [Evidence(FIRM, -0.5, 1.0), Evidence(HINT, 0.25, HINT_WEIGHT)]


def test_free_reports_count_by_the_word_of_who_gave_them() -> None:
    reports = [("honest", OPEN, -1.0), ("found out", OPEN, 5.0), ("new", OPEN, -1.1), ("nobody", OPEN, 9.0)]
    found = evidence_of({}, reports, {"honest": 2000, "found out": 0, "new": 500})
    assert found == [Evidence(OPEN, -1.0, FREE_WEIGHT), Evidence(OPEN, -1.1, FREE_WEIGHT / 4)]


def test_what_contradicts_the_table_counts_for_nothing() -> None:
    reports = [("honest", FIRM, -0.6), ("honest", FIRM, 0.5)]
    assert evidence_of(TABLE, reports, {"honest": 1})[2:] == [Evidence(FIRM, -0.6, FREE_WEIGHT)]
