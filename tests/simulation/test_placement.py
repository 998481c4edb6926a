"""Nodes that decide by themselves what to serve come to serve every block nearly as well as can be."""

import pytest

from tests.simulation.placement import play


@pytest.mark.parametrize("seed", [31, pytest.param(44, marks=pytest.mark.soak)])
def test_placement_balances_blocks_and_recovers_from_losing_a_third(seed: int) -> None:
    result = play(seed)
    assert result.joined_share >= 0.9
    assert result.left_share < 0.9, "nothing to close"
    assert result.recovered_share >= 0.95
    assert result.moves_per_node < 2
    assert result.uncovered_by_moves == 0


def test_same_seed_gives_same_swarm() -> None:
    assert play(3, nodes=20) == play(3, nodes=20)


def test_placement_of_few_nodes_covers_every_block() -> None:
    assert play(2, nodes=12, block_count=12).recovered_share > 0.7
