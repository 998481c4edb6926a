"""Plans of moves keep to what may be moved, and help."""

import random

from hypothesis import given
from hypothesis import strategies as st

from protocol.identity import BlockRange, PeerId, Stage
from selector.placement import Server, block_rates, plan_moves


@st.composite
def swarms(draw: st.DrawFn) -> tuple[int, list[Server]]:
    block_count = draw(st.integers(1, 12))

    def server(number: int) -> Server:
        start = draw(st.integers(0, block_count - 1))
        end = draw(st.integers(start + 1, block_count))
        rate = draw(st.sampled_from((0.1, 1.0, 7.0, 100.0)))
        return Server(Stage(PeerId(f"{number}"), BlockRange(start, end)), rate, movable=draw(st.booleans()))

    return block_count, [server(number) for number in range(draw(st.integers(0, 8)))]


@given(swarms())
def test_plan_moves_only_movable_servers_and_never_lowers_the_minimum(swarm: tuple[int, list[Server]]) -> None:
    block_count, servers = swarm
    moves = plan_moves(block_count, servers, random.Random(0))
    assert moves == plan_moves(block_count, servers[::-1], random.Random(0))
    before = block_rates(block_count, servers)
    after = block_rates(block_count, [])
    for server in servers:
        blocks = moves.get(server.stage.peer, server.stage.blocks)
        assert blocks.end <= block_count
        assert len(blocks) == len(server.stage.blocks)
        assert server.movable or server.stage.peer not in moves
        after[blocks.start : blocks.end] += server.rate
    if moves:
        served = [int((rates > 1e-9).sum()) for rates in (before, after)]
        assert served[1] > served[0] or (served[1] == served[0] and after[after > 0].min() > before[before > 0].min())
