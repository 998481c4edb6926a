"""Peers of different memory that serve packages of different formats come to cover every block by spans that join."""

import pytest

from tests.simulation.mixed import MODELS, play


@pytest.mark.parametrize(
    ("seed", "peers"), [(1, 60), *(pytest.param(seed, 240, marks=pytest.mark.soak) for seed in range(2, 12))]
)
def test_every_model_comes_to_be_complete_while_peers_come_and_go(seed: int, peers: int) -> None:
    outcome = play(seed, peers=peers)
    assert not outcome.faults, "complete means that there is a route, and spans lie where the model may be cut"
    assert outcome.joined == outcome.recovered == dict.fromkeys(MODELS, True)
    assert min(outcome.complete_share.values()) > 0.7, "a hole lasts until its death is noticed and the next round"
    assert outcome.moves
