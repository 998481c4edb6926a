"""What the coordinator knows of the peers when it plans a route."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from node.stages.voter import Agreement
from node.swarm.directory import Candidate
from protocol.capabilities import Capabilities, fastest_bytes_per_s, hardware_class, stage_facts
from protocol.figures import USUAL_PRICE
from protocol.identity import BlockRange, ModelId, PeerId, Stage
from protocol.limits import MAX_STAGE_FACTS
from protocol.stage_facts import StageFacts
from selector.cuts import Cuts
from selector.routing import Links


class Finder(Protocol):
    """Knows which peers serve what; `node.swarm.membership` is the real one."""

    async def candidates(
        self, model: ModelId, cuts: Cuts, links: Links, *, without: Iterable[PeerId]
    ) -> tuple[Candidate, ...]:
        """Return the live peers that serve spans of a model; queries the DHT where the known ones do not suffice."""

    def known_candidates(self, model: ModelId, *, without: Iterable[PeerId]) -> tuple[Candidate, ...]:
        """Return the known live peers that serve spans of a model, without a search."""

    def unreached_stages(self, model: ModelId, blocks: Sequence[BlockRange]) -> tuple[Stage, ...]:
        """Return the spans with some of these blocks that live peers announce which this node has not reached."""

    def forget(self, peer: PeerId) -> None:
        """Treat a peer as dead until its next heartbeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmView:
    """What the coordinator knows of the peers.

    `links`: between any two peers. `capabilities`: what a peer's signed record says of its machine, None where no valid
    one is known. `expected`: the blocks of a model that live peers serve or are loading. `agreed`:
    the swarm's agreed statement about a model.
    """

    finder: Finder
    links: Links
    capabilities: Callable[[PeerId], Capabilities | None] = lambda peer: None
    expected: Callable[[ModelId], Iterable[BlockRange]] = lambda model: ()
    agreed: Callable[[ModelId], Agreement | None] = lambda model: None

    def hardware(self, peer: PeerId) -> str:
        """Return the class of a peer's hardware; `unknown` without a record."""
        capabilities = self.capabilities(peer)
        return "unknown" if capabilities is None else hardware_class(capabilities)

    def bandwidth(self, peer: PeerId) -> float | None:
        """Return the memory bandwidth that a peer reports, bytes per second."""
        capabilities = self.capabilities(peer)
        return None if capabilities is None else fastest_bytes_per_s(capabilities)

    def price(self, peer: PeerId) -> float:
        """Return the price that a peer announces for a second of computing."""
        capabilities = self.capabilities(peer)
        return USUAL_PRICE if capabilities is None or capabilities.price is None else capabilities.price

    def stage_facts(self, stages: Sequence[Stage]) -> tuple[StageFacts, ...]:
        """Return the facts of a route's stages; none where not all are known, or where they are too many."""
        found = []
        for stage, after in zip(stages, [*stages[1:], *stages[:1]], strict=True):
            capabilities = self.capabilities(stage.peer)
            if capabilities is None or len(stages) > MAX_STAGE_FACTS:
                return ()
            link = self.links(stage.peer, after.peer)
            found.append(
                stage_facts(
                    capabilities,
                    len(stage.blocks),
                    round_trip_s=link.round_trip_s if link.is_round_trip_known else None,
                    link_bytes_per_s=link.bytes_per_s if link.is_rate_known else None,
                )
            )
        return tuple(found)
