"""Nodes that decide by themselves what to serve come to serve every block nearly as well as can be."""

import pytest

from tests.simulation.placement import play


@pytest.mark.parametrize("seed", [30, 44])
def test_a_hundred_unequal_nodes_share_the_blocks_and_close_the_gaps_that_a_third_leaves(seed: int) -> None:
    result = play(seed)
    assert result.joined_share >= 0.9
    assert result.left_share < 0.9, "nothing to close"
    assert result.recovered_share >= 0.95
    assert result.moves_per_node < 2
    assert result.uncovered_by_moves == 0


def test_the_same_seed_gives_the_same_swarm() -> None:
    assert play(3, nodes=20) == play(3, nodes=20)


def test_a_few_nodes_serve_every_block() -> None:
    assert play(2, nodes=12, block_count=12).recovered_share > 0.7
