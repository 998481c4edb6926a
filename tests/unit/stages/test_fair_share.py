"""Admission control by max-min fairness."""

from node.stages.fair_share import may_take
from protocol.identity import peer_id_from_public_key


def test_max_min_share_refuses_largest_holder_first() -> None:
    own, a, b, c = (peer_id_from_public_key(bytes([number]) * 32) for number in range(4))
    assert may_take(a, 700, own=own, pages=800, held={}), "whoever comes first may have all but the reserve"
    assert not may_take(a, 701, own=own, pages=800, held={})
    assert may_take(a, 600, own=own, pages=800, held={own: 200, b: 0})
    assert not may_take(a, 601, own=own, pages=800, held={own: 200, b: 0})
    assert may_take(own, 800, own=own, pages=800, held={})
    assert may_take(a, 3, own=own, pages=3, held={}), "small memory has no room for reserves"
    assert may_take(a, 80, own=own, pages=800, held={a: 500})
    assert not may_take(a, 80, own=own, pages=800, held={a: 590})
    assert may_take(b, 80, own=own, pages=800, held={a: 590})
    assert not may_take(b, 200, own=own, pages=800, held={a: 590}), "there is not so much"
    assert may_take(own, 200, own=own, pages=800, held={a: 590})
    assert may_take(a, 100, own=own, pages=800, held={a: 250, b: 100, c: 50})
    assert not may_take(a, 100, own=own, pages=800, held={a: 250, b: 100, c: 50}, waiting=350)
    assert may_take(b, 100, own=own, pages=800, held={a: 250, b: 100, c: 50}, waiting=350)
    assert may_take(a, 1, own=own, pages=3, held={a: 1}), "small memory has no room for reserves"
