"""The chains that this node follows: the consensus adds them; votes, routes and the learner read what was agreed."""

from collections import Counter
from dataclasses import dataclass, field

import trio

from node.consensus.chain_node import ChainNode
from node.stages.voter import Agreement
from protocol.identity import ModelId
from selector.consensus.reputation import relative_trust
from selector.evidence import AgreedTable


@dataclass(frozen=True, slots=True)
class FollowedChains:
    """Chains by model."""

    nodes: dict[ModelId, ChainNode] = field(default_factory=dict)
    used_s: dict[ModelId, float] = field(default_factory=dict)
    """When a job was last in need of what is agreed about a model, by the clock of trio."""

    def agreement(self, model: ModelId) -> Agreement | None:
        """Return what is agreed about a model's methods, for a job."""
        self.used_s[model] = trio.current_time()
        chain = self.nodes.get(model)
        return chain.agreement if chain else None

    def tables(self) -> list[AgreedTable]:
        """Return what is agreed about the methods of each model."""
        found = ((model, chain.agreement) for model, chain in self.nodes.items())
        return [
            AgreedTable(
                model=model,
                epoch=agreed.epoch,
                digest=agreed.table_digest,
                cells=agreed.table,
                members=Counter(agreed.hardware[peer] for peer in agreed.weights),
            )
            for model, agreed in found
            if agreed is not None
        ]

    def trust(self) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Return the trust in the members of each model's chain, and in every other peer there."""
        members: dict[str, dict[str, float]] = {}
        others: dict[str, float] = {}
        for model, chain in self.nodes.items():
            trust, rest = relative_trust(chain.agreement.weights if chain.agreement else {})
            if trust:
                members[model], others[model] = trust, rest
        return members, others
