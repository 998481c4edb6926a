"""Which model a client names, where peers announce models whose ids begin alike."""

from typing import Any, cast

import pytest

from node.api.interface import ModelDocument
from node.api.model_lookup import find_model

OURS, NAMED, TWIN, OTHER = ("12345678" + rest * 56 for rest in "0189")


def document(model: str, **fields: Any) -> ModelDocument:
    """Return a model as the node describes one that only peers have, without a name."""
    return cast("ModelDocument", {"model": model, "name": model[:16], "local": False} | fields)


@pytest.mark.parametrize("own", [document(OURS, local=True), document(OURS, name="tiny")])
def test_models_of_peers_make_no_prefix_of_our_own_ambiguous(own: ModelDocument) -> None:
    models = [document(TWIN), own, document(OTHER)]
    for name in (OURS[:8], OURS[:16], OURS, own["name"]):
        assert find_model(name, models) is own
    assert find_model(TWIN[:16], models) is models[0]


def test_model_that_only_peers_have_is_meant_by_as_many_digits_as_in_jobs() -> None:
    models = [document(TWIN)]
    assert find_model(TWIN[:15], models) is None
    assert find_model(TWIN[:16], models) is find_model(TWIN, models) is models[0]


def test_prefix_of_two_own_models_means_neither() -> None:
    models = [document(OURS, local=True), document(NAMED, name="tiny")]
    assert find_model(OURS[:8], models) is None
    assert find_model(OURS[:9], models) is models[0]
    assert find_model(OURS[:7], models[:1]) is None
