"""Which blocks a node takes, and who moves; `tests/simulation/test_placement.py` has whole swarms."""

import random

import pytest

from protocol.identity import BlockRange, PeerId, Stage
from selector.placement import Server, choose_span, may_drop, plan_moves, still_worthwhile


def server(peer: str, start: int, end: int, rate: float, *, movable: bool = True) -> Server:
    return Server(Stage(PeerId(peer), BlockRange(start, end)), rate, movable)


def test_the_first_node_takes_the_first_blocks_and_the_next_those_that_nobody_serves() -> None:
    assert choose_span(12, [], 5, 10) == BlockRange(0, 5)
    assert choose_span(12, [server("a", 0, 5, 10)], 4, 10).start >= 5
    assert choose_span(12, [server("a", 0, 5, 10), server("b", 7, 12, 10)], 2, 10) == BlockRange(5, 7)
    assert choose_span(12, [], 99, 10) == BlockRange(0, 12)
    with pytest.raises(ValueError, match="at least one block"):
        choose_span(12, [], 0, 10)


def test_the_weakest_blocks_come_first_by_throughput_and_not_by_number_of_peers() -> None:
    slow = [server(f"slow{n}", 0, 6, 1) for n in range(3)]
    assert choose_span(12, [*slow, server("fast", 6, 12, 100)], 6, 10) == BlockRange(0, 6)


def test_a_hole_is_filled_by_as_few_as_it_takes() -> None:
    servers = [server(f"{n}", 0, 6, 10) for n in range(5)]
    moves = plan_moves(12, servers, random.Random(0))
    assert len(moves) == 2
    assert set(moves.values()) == {BlockRange(6, 12)}


def test_who_was_told_what_to_serve_is_not_moved() -> None:
    servers = [server(f"{n}", 0, 6, 10, movable=False) for n in range(5)]
    assert plan_moves(12, servers, random.Random(0)) == {}
    moves = plan_moves(12, [*servers, server("free", 0, 6, 10)], random.Random(0))
    assert moves == {"free": BlockRange(6, 12)}


def test_nobody_moves_for_nothing() -> None:
    servers = [server("a", 0, 6, 10), server("b", 6, 12, 10)]
    assert plan_moves(12, servers, random.Random(0)) == {}
    assert plan_moves(12, [], random.Random(0)) == {}


def test_a_move_that_another_has_made_needless_is_dropped() -> None:
    now = server("me", 0, 6, 10)
    others = [server("a", 0, 6, 10), server("b", 0, 6, 10)]
    assert still_worthwhile(12, others, now, BlockRange(6, 12))
    assert not still_worthwhile(
        12, [server("a", 0, 6, 10), *(server(p, 6, 12, 10) for p in "bc")], now, BlockRange(6, 12)
    )


def test_the_last_who_serves_a_block_keeps_it() -> None:
    assert not may_drop(12, [server("a", 6, 12, 10)], BlockRange(0, 6), BlockRange(6, 12))
    assert not may_drop(12, [server("a", 0, 5, 10)], BlockRange(0, 6), BlockRange(6, 12))
    assert may_drop(12, [server("a", 0, 4, 10)], BlockRange(0, 6), BlockRange(4, 10))
