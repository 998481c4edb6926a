"""Which blocks a node takes, and who moves; `tests/simulation/test_placement.py` has whole swarms."""

import random

import pytest

from protocol.identity import BlockRange, PeerId, Stage
from selector.placement import Server, choose_span, may_drop, plan_moves, still_worthwhile


def server(peer: str, start: int, end: int, rate: float, *, movable: bool = True) -> Server:
    return Server(Stage(PeerId(peer), BlockRange(start, end)), rate, movable)


def test_joining_node_takes_unserved_blocks() -> None:
    assert choose_span(12, [], [5] * 12, 50) == BlockRange(0, 5)
    assert choose_span(12, [server("a", 0, 5, 10)], [4] * 12, 40).start >= 5
    assert choose_span(12, [server("a", 0, 5, 10), server("b", 7, 12, 10)], [2] * 12, 20) == BlockRange(5, 7)
    assert choose_span(12, [], [99] * 12, 100) == BlockRange(0, 12)
    with pytest.raises(ValueError, match="at least one block"):
        choose_span(12, [], [0] * 12, 10)


def test_joining_nodes_hold_fewer_blocks_with_embedding_or_head_and_leave_no_gap() -> None:
    count, middle = 32, 11
    longest = [9] + [min(middle, count - 1 - start) for start in range(1, count)]
    longest[-8:] = range(8, 0, -1)  # 8 blocks with the head
    servers: list[Server] = []
    for peer in "abcd":
        blocks = choose_span(count, servers, longest, 100)
        assert len(blocks) <= longest[blocks.start]
        servers.append(Server(Stage(PeerId(peer), blocks), 100 / len(blocks)))
    assert [str(each.stage.blocks) for each in servers] == ["0-9", "9-20", "20-31", "24-32"]


def test_weakest_blocks_are_weakest_by_throughput() -> None:
    slow = [server(f"slow{n}", 0, 6, 1) for n in range(3)]
    assert choose_span(12, [*slow, server("fast", 6, 12, 100)], [6] * 12, 60) == BlockRange(0, 6)


def test_hole_is_filled_with_the_fewest_moves() -> None:
    servers = [server(f"{n}", 0, 6, 10) for n in range(5)]
    moves = plan_moves(12, servers, random.Random(0))
    assert len(moves) == 2
    assert set(moves.values()) == {BlockRange(6, 12)}


def test_fixed_server_is_not_moved() -> None:
    servers = [server(f"{n}", 0, 6, 10, movable=False) for n in range(5)]
    assert plan_moves(12, servers, random.Random(0)) == {}
    moves = plan_moves(12, [*servers, server("free", 0, 6, 10)], random.Random(0))
    assert moves == {"free": BlockRange(6, 12)}


def test_balanced_swarm_makes_no_moves() -> None:
    servers = [server("a", 0, 6, 10), server("b", 6, 12, 10)]
    assert plan_moves(12, servers, random.Random(0)) == {}
    assert plan_moves(12, [], random.Random(0)) == {}


def test_needless_move_is_dropped() -> None:
    now = server("me", 0, 6, 10)
    others = [server("a", 0, 6, 10), server("b", 0, 6, 10)]
    assert still_worthwhile(12, others, now, BlockRange(6, 12))
    assert not still_worthwhile(
        12, [server("a", 0, 6, 10), *(server(p, 6, 12, 10) for p in "bc")], now, BlockRange(6, 12)
    )


def test_last_server_of_a_block_keeps_it() -> None:
    assert not may_drop(12, [server("a", 6, 12, 10)], BlockRange(0, 6), BlockRange(6, 12))
    assert not may_drop(12, [server("a", 0, 5, 10)], BlockRange(0, 6), BlockRange(6, 12))
    assert may_drop(12, [server("a", 0, 4, 10)], BlockRange(0, 6), BlockRange(4, 10))
