from types import SimpleNamespace
from typing import Any

from node.consensus.followed_chains import FollowedChains
from protocol.identity import ModelId

FOLLOWED, ANOTHER, NEW = (ModelId(name * 32) for name in ("ab", "cd", "ef"))


def chain(weights: dict[str, int] | None) -> Any:
    return SimpleNamespace(agreement=None if weights is None else SimpleNamespace(weights=weights))


def test_trust_is_that_of_each_model_s_own_chain() -> None:
    nodes = {FOLLOWED: chain({"a": 3000, "b": 1500}), ANOTHER: chain({"liar": 710}), NEW: chain(None)}
    trust, others = FollowedChains(nodes).trust()
    assert trust == {FOLLOWED: {"a": 1.0, "b": 0.5}, ANOTHER: {"liar": 1.0}}
    assert 0 < others[FOLLOWED] < 0.5
    assert set(others) == {FOLLOWED, ANOTHER}
