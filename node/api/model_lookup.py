"""The model that a client names, among those that the node knows."""

from collections.abc import Iterable
from typing import Final

from node.api.interface import ModelDocument

MIN_ID_DIGITS: Final = 8
"""How much of an id names a model, as for jobs."""


def find_model(name: str, models: Iterable[ModelDocument]) -> ModelDocument | None:
    """Return the model with a name, or the only one whose id begins with it."""
    known = list(models)
    for model in known:
        if name in {model["name"], model["model"]}:
            return model
    begun = [model for model in known if len(name) >= MIN_ID_DIGITS and model["model"].startswith(name)]
    return begun[0] if len(begun) == 1 else None
