"""GossipSub peer scores: which neighbours are pruned or graylisted, and for how long.

The library's weights are all zero by default. Where they are set, its score is forgotten as soon as a peer disconnects,
topics are scored apart, a badly scored peer stays in the mesh, everything that a validator refuses counts as the
neighbour's fault, and an invalid signature does not. All of that is corrected here and in `gossip.py`. Points and decay
as in the specification of GossipSub v1.1, P2, P4 and P5.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from libp2p.peer.id import ID
from libp2p.pubsub.score import PeerScorer, ScoreParams, TopicScoreParams

MAX_RETAINED: Final = 4096
"""Disconnected peers whose bad score is remembered: reconnecting must not reset it."""

FORGIVEN_SCORE: Final = -1.0
"""A disconnected peer whose score has decayed to this is forgotten."""

PARAMETERS: Final = ScoreParams(
    # P1 and P3 stay at zero: the library counts joins instead of time, and no deliveries within the mesh.
    p2_first_message_deliveries=TopicScoreParams(weight=0.5, cap=10, decay=0.98),
    p4_invalid_messages=TopicScoreParams(weight=10, cap=100, decay=0.99),
    p5_behavior_penalty_weight=1,
    p5_behavior_penalty_threshold=30,
    p5_behavior_penalty_decay=0.95,
    # P7 stays at zero: neighbours within one range are bounded in the mesh, not silenced; see `gossip.Router`.
    gossip_threshold=-10,
    publish_threshold=-40,  # the library asks it of what comes in as well: here the graylist begins
    graylist_threshold=-40,
    accept_px_threshold=0,
)
"""Decays are per heartbeat, which is a second. Five invalid messages graylist a peer, which is forgiven after half a
minute; a hundred and more are forgiven after five. First deliveries of valid messages outweigh half an invalid one in
each topic, so faults cannot be bought with deliveries."""


class Scores(PeerScorer):
    """The scores of all neighbours over all topics together."""

    def __init__(self, topics: Sequence[str]) -> None:
        super().__init__(PARAMETERS)
        self._topics = list(topics)
        self._retained: OrderedDict[ID, None] = OrderedDict()

    def of(self, peer: ID) -> float:
        """Return the score of a peer; below zero it is not wanted in a mesh."""
        return super().score(peer, self._topics)

    def score(self, peer: ID, topics: list[str]) -> float:
        """Return the score of a peer, the same for every topic."""
        return self.of(peer)

    def graylisted(self, peer: ID) -> bool:
        """Return whether everything from a peer is ignored."""
        return self.of(peer) < self.params.graylist_threshold

    def allow_publish(self, peer: ID, topics: list[str]) -> bool:
        """Return whether messages are exchanged with a peer."""
        return self.of(peer) >= self.params.publish_threshold

    def allow_gossip(self, peer: ID, topics: list[str]) -> bool:
        """Return whether a peer gets IHAVE."""
        return self.of(peer) >= self.params.gossip_threshold

    def on_invalid_message(self, peer: ID, topic: str) -> None:
        """Count nothing: the library calls this for every refusal."""

    def invalid(self, peer: ID, topic: str) -> None:
        """Count a message that no honest peer would have forwarded."""
        count = self.invalid_messages[peer]
        # Capped here as well: the library caps what the count weighs, and lets it take ever longer to fade.
        count[topic] = min(count[topic] + 1, self.params.p4_invalid_messages.cap)

    def remove_peer(self, peer: ID) -> None:
        """Forget a peer that has disconnected, unless its score is bad."""
        if self.of(peer) >= FORGIVEN_SCORE:
            super().remove_peer(peer)
            return
        self.first_message_deliveries.pop(peer, None)
        self._retained[peer] = None
        if len(self._retained) > MAX_RETAINED:
            oldest, _ = self._retained.popitem(last=False)
            super().remove_peer(oldest)

    def returned(self, peer: ID) -> None:
        """Mark a peer as connected again."""
        self._retained.pop(peer, None)

    def on_heartbeat(self, dt_seconds: float = 1.0) -> None:
        """Decay the counters by one second."""
        super().on_heartbeat(dt_seconds)
        for peer in [peer for peer in self._retained if self.of(peer) >= FORGIVEN_SCORE]:
            del self._retained[peer]
            super().remove_peer(peer)
