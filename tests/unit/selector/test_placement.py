"""Which blocks a node takes, and who moves; `tests/simulation/test_placement.py` has whole swarms."""

import random

import pytest

from selector.placement import Server, choose_span, may_drop, plan_moves, still_worthwhile


def test_the_first_node_takes_the_first_blocks_and_the_next_those_that_nobody_serves() -> None:
    assert choose_span(12, [], 5, 10) == (0, 5)
    assert choose_span(12, [Server("a", 0, 5, 10)], 4, 10)[0] >= 5
    assert choose_span(12, [Server("a", 0, 5, 10), Server("b", 7, 12, 10)], 2, 10) == (5, 7)
    assert choose_span(12, [], 99, 10) == (0, 12)
    with pytest.raises(ValueError, match="no block"):
        choose_span(12, [], 0, 10)


def test_the_weakest_blocks_come_first_by_throughput_and_not_by_number_of_peers() -> None:
    slow = [Server(f"slow{n}", 0, 6, 1) for n in range(3)]
    assert choose_span(12, [*slow, Server("fast", 6, 12, 100)], 6, 10) == (0, 6)


def test_a_hole_is_filled_by_as_few_as_it_takes() -> None:
    servers = [Server(f"{n}", 0, 6, 10) for n in range(5)]
    moves = plan_moves(12, servers, random.Random(0))
    assert len(moves) == 2
    assert set(moves.values()) == {(6, 12)}


def test_who_was_told_what_to_serve_is_not_moved() -> None:
    servers = [Server(f"{n}", 0, 6, 10, movable=False) for n in range(5)]
    assert plan_moves(12, servers, random.Random(0)) == {}
    moves = plan_moves(12, [*servers, Server("free", 0, 6, 10)], random.Random(0))
    assert moves == {"free": (6, 12)}


def test_nobody_moves_for_nothing() -> None:
    servers = [Server("a", 0, 6, 10), Server("b", 6, 12, 10)]
    assert plan_moves(12, servers, random.Random(0)) == {}
    assert plan_moves(12, [], random.Random(0)) == {}


def test_a_move_that_another_has_made_needless_is_dropped() -> None:
    now = Server("me", 0, 6, 10)
    others = [Server("a", 0, 6, 10), Server("b", 0, 6, 10)]
    assert still_worthwhile(12, others, now, (6, 12))
    assert not still_worthwhile(12, [Server("a", 0, 6, 10), *(Server(p, 6, 12, 10) for p in "bc")], now, (6, 12))


def test_the_last_who_serves_a_block_keeps_it() -> None:
    assert not may_drop(12, [Server("a", 6, 12, 10)], (0, 6), (6, 12))
    assert not may_drop(12, [Server("a", 0, 5, 10)], (0, 6), (6, 12))
    assert may_drop(12, [Server("a", 0, 4, 10)], (0, 6), (4, 10))
