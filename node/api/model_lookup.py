"""The model that a client names, among those that the node knows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from node.models.id_prefix import meant_by
from protocol.identity import ModelId

if TYPE_CHECKING:
    from node.api.interface import ModelDocument


def find_model(name: str, models: "Sequence[ModelDocument]") -> "ModelDocument | None":
    """Return the model with a name, or the only one whose id begins with it, by the rule for the models of jobs."""
    by_id: dict[ModelId, ModelDocument] = {ModelId(model["model"]): model for model in models}
    named = next((model for model in models if name == model["name"]), None)
    # A model without a name of its own is listed by the beginning of its id.
    own = [key for key, model in by_id.items() if model["local"] or not key.startswith(model["name"])]
    meant = meant_by(name, own, by_id)
    return named or (by_id[meant.pop()] if len(meant) == 1 else None)
