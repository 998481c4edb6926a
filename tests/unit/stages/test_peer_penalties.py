"""Per-peer records: bounded to recent peers, with totals that count all."""

from node.stages.peer_penalties import MAX_PEERS, PeerPenalties, SessionTotals
from protocol.identity import JobId, SessionId, peer_id_from_public_key
from protocol.messages import FailureReason, RefusalReason

SESSION = SessionId(JobId("ab" * 16), 0)
OWN = peer_id_from_public_key(b"\xff" * 32)
MANY = MAX_PEERS + 44


def test_totals_count_peers_that_are_forgotten() -> None:
    records = PeerPenalties(OWN)
    before = (0, 0, 0)
    for number in range(MANY):
        peer = peer_id_from_public_key(number.to_bytes(32, "big"))
        records.opened(peer)
        records.refused(peer, RefusalReason.FULL, session=SESSION, request_id="", why="tested")
        records.failed(peer, FailureReason.ENGINE, session=SESSION, request_id="", why="tested")
        totals = records.totals
        now = (totals.opened, totals.refused, totals.failed)
        assert now > before
        before = now
    assert before == (MANY,) * 3
    assert len(records.statistics()) == MAX_PEERS


def test_totals_are_those_of_other_peers() -> None:
    records = PeerPenalties(OWN)
    records.opened(OWN)
    records.refused(OWN, RefusalReason.FULL, session=SESSION, request_id="", why="tested")
    records.failed(OWN, FailureReason.ENGINE, session=SESSION, request_id="", why="tested")
    assert records.totals == SessionTotals()
    assert records.statistics()[OWN].opened == 1
