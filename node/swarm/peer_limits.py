"""What each peer may cost us: allowances that refill with time, and penalties for those who broke a rule.

A peer's flood uses up that peer's allowance and nobody else's. What is remembered is bounded: of peers never heard of
again only the latest are kept.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

from node.util.token_bucket import Allowance
from protocol.identity import PeerId

MAX_PEERS = 4096

PENALTY_S = (10.0, 3600.0)
"""How long a peer is barred after its first offence, doubled by each one after, and the longest."""

FORGIVEN_AFTER_S = 600.0
"""Each time so long without an offence takes one away."""

BACKOFF_S = (2.0, 300.0)
"""How long a peer with which an exchange failed is left alone, doubled by each failure in a row, and the longest."""


class Ban(NamedTuple):
    """For how much longer a peer is barred, and for what."""

    left_s: float
    reason: str


class Standing:
    """What one peer may cost us now."""

    def __init__(
        self, gossip: Allowance, work: Allowance, traffic: Allowance, sessions: Allowance, now_s: float
    ) -> None:
        self.gossip = gossip.bucket(now_s)
        self.work = work.bucket(now_s)
        self.traffic = traffic.bucket(now_s)
        self.sessions = sessions.bucket(now_s)
        self.barred_until_s = now_s
        self.offence = ""
        """What it was barred for last."""
        self.retry_at_s = now_s
        self._offences = 0.0
        self._offended_at_s = now_s
        self._failures = 0

    def barred(self, now_s: float) -> bool:
        """Whether nothing of this peer is looked at now."""
        return now_s < self.barred_until_s

    def penalise(self, now_s: float, offence: str = "") -> float:
        """Bar the peer for an offence; return for how many seconds."""
        self.offence = offence
        self._offences = max(0.0, self._offences - (now_s - self._offended_at_s) / FORGIVEN_AFTER_S)
        self._offended_at_s = now_s
        first_s, longest_s = PENALTY_S
        seconds = min(longest_s, first_s * math.pow(2, self._offences))
        self._offences = min(self._offences + 1, 16)
        self.barred_until_s = now_s + seconds
        return seconds

    def failed(self, now_s: float, factor: float) -> None:
        """Leave the peer alone for a while, times a random factor; longer after each failure in a row."""
        first_s, longest_s = BACKOFF_S
        self.retry_at_s = now_s + factor * min(longest_s, first_s * math.pow(2, self._failures))
        self._failures = min(self._failures + 1, 16)

    def succeeded(self) -> None:
        """Forget the failures."""
        self._failures = 0


class Standings:
    """The standing of every peer that we have had to do with of late."""

    def __init__(self, gossip: Allowance, work: Allowance, traffic: Allowance, sessions: Allowance) -> None:
        """Take what each peer is allowed.

        `gossip`, `work`: signatures that we verify for it, or other work that takes as long, of what it publishes and
        of what it asks for. `traffic`: bytes that we send to it. `sessions`: how many it may begin.
        """
        self._allowances = (gossip, work, traffic, sessions)
        self._standings: OrderedDict[PeerId, Standing] = OrderedDict()

    def of(self, peer: PeerId, now_s: float) -> Standing:
        """Return a peer's standing."""
        standing = self._standings.get(peer)
        if standing is None:
            standing = self._standings[peer] = Standing(*self._allowances, now_s)
            if len(self._standings) > MAX_PEERS:
                self._standings.popitem(last=False)
        else:
            self._standings.move_to_end(peer)
        return standing

    def bans(self, now_s: float) -> dict[PeerId, Ban]:
        """Return for how much longer, and for what, peers are barred now."""
        return {
            peer: Ban(standing.barred_until_s - now_s, standing.offence)
            for peer, standing in self._standings.items()
            if standing.barred(now_s)
        }

    def barred(self, now_s: float) -> tuple[PeerId, ...]:
        """Return the peers that are barred now."""
        return tuple(peer for peer, standing in self._standings.items() if standing.barred(now_s))
