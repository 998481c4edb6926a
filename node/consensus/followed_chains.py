"""The chains that this node follows: the consensus adds them; votes, routes and the learner read what was agreed."""

from dataclasses import dataclass, field

from node.consensus.chain_node import ChainNode
from node.stages.voter import Agreement
from protocol.identity import ModelId
from selector.consensus.reputation import NEWCOMER_WEIGHT
from selector.evidence import AgreedTable


@dataclass(frozen=True, slots=True)
class FollowedChains:
    """Chains by model."""

    nodes: dict[ModelId, ChainNode] = field(default_factory=dict)

    def agreement(self, model: ModelId) -> Agreement | None:
        """Return what is agreed about a model's methods."""
        chain = self.nodes.get(model)
        return chain.agreement if chain else None

    def tables(self) -> list[AgreedTable]:
        """Return what is agreed about the methods of each model."""
        found = ((model, chain.agreement) for model, chain in self.nodes.items())
        return [
            AgreedTable(model=model, epoch=agreed.epoch, digest=agreed.table_digest, cells=agreed.table)
            for model, agreed in found
            if agreed is not None
        ]

    def trust(self) -> tuple[dict[str, float], float]:
        """Return the trust in each member, from 0 to 1, and in every other peer.

        It is the weight relative to the largest one, the lowest of all chains. Without any statement every peer is
        trusted.
        """
        trust: dict[str, float] = {}
        in_others = 1.0
        for chain in self.nodes.values():
            weights = chain.agreement.weights if chain.agreement else {}
            if most := max(weights.values(), default=0):
                in_others = min(in_others, NEWCOMER_WEIGHT / most)
                for peer, weight in weights.items():
                    trust[peer] = min(trust.get(peer, 1.0), weight / most)
        return trust, in_others
