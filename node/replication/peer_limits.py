"""Rate limits, bans and backoff by peer: a flood exhausts only the allowances of its sender. No clock of its own."""

import random
from typing import NamedTuple

import structlog
from cachetools import Cache, LRUCache

from node.util.backoff import backoff_s
from node.util.token_bucket import Allowance
from protocol.identity import PeerId

MAX_PEERS = 4096
"""Peers that are remembered; the least recently active one is evicted."""

BAN_S = (10.0, 3600.0)
"""Ban for a first violation, doubled by each further one, and the longest ban."""

FORGIVEN_AFTER_S = 600.0
"""Every period of this length without a violation cancels one."""

BACKOFF_S = (2.0, 300.0)
"""Pause after a failed session, doubled by each failure in a row, and the longest pause."""

_logger = structlog.get_logger(__name__)


class Ban(NamedTuple):
    """How much longer a peer is banned, and for which violation."""

    left_s: float
    reason: str


class PeerAllowances(NamedTuple):
    """Rates granted to each peer."""

    gossip: Allowance
    """Signatures verified of what it publishes."""
    work: Allowance
    """Work for sessions that it begins, in signatures verified."""
    traffic: Allowance
    """Bytes sent to it in these sessions."""
    sessions: Allowance
    """Sessions that it may begin."""


class LimitedPeer:
    """Token buckets, ban and backoff of one peer."""

    def __init__(self, allowances: PeerAllowances, now_s: float) -> None:
        self.gossip, self.work, self.traffic, self.sessions = (each.bucket(now_s) for each in allowances)
        self.banned_until_s = now_s
        self.reason = ""
        """The latest violation."""
        self.retry_at_s = now_s
        self._violations = 0.0
        self._violated_at_s = now_s
        self._failures = 0

    def is_banned(self, now_s: float) -> bool:
        """Return whether everything from this peer is ignored now."""
        return now_s < self.banned_until_s

    def may_ask(self, now_s: float) -> bool:
        """Return whether we may begin a session with this peer."""
        return not self.is_banned(now_s) and now_s >= self.retry_at_s

    def ban(self, now_s: float, reason: str) -> float:
        """Ban the peer for a violation; return for how many seconds."""
        self.reason = reason
        forgiven = (now_s - self._violated_at_s) / FORGIVEN_AFTER_S
        self._violations = max(0.0, self._violations - forgiven)
        self._violated_at_s = now_s
        seconds = min(BAN_S[1], BAN_S[0] * 2**self._violations)
        self._violations = min(self._violations + 1, 16)
        self.banned_until_s = now_s + seconds
        return seconds

    def back_off(self, now_s: float, jitter: random.Random) -> None:
        """Pause sessions with the peer, longer after each failure in a row."""
        self._failures += 1
        self.retry_at_s = now_s + backoff_s(self._failures, BACKOFF_S, jitter)

    def reset_backoff(self) -> None:
        """Forget the failures after a session that succeeded."""
        self._failures = 0


class PeerLimits:
    """The limits of every peer that was active recently."""

    def __init__(self, allowances: PeerAllowances) -> None:
        self._allowances = allowances
        self._peers: LRUCache[PeerId, LimitedPeer] = LRUCache(MAX_PEERS)

    def of(self, peer: PeerId, now_s: float) -> LimitedPeer:
        """Return the limits of a peer."""
        found = self._peers.get(peer)
        if found is None:
            found = self._peers[peer] = LimitedPeer(self._allowances, now_s)
        return found

    def ban(self, peer: PeerId, now_s: float, reason: str) -> None:
        """Ban a peer for a violation of the protocol."""
        seconds = self.of(peer, now_s).ban(now_s, reason)
        _logger.warning("peer banned", peer=peer, seconds=seconds, reason=reason)

    def bans(self, now_s: float) -> dict[PeerId, Ban]:
        """Return the peers that are banned now."""
        # Past LRUCache, for which a reading counts as activity of the peer.
        known = ((peer, Cache.__getitem__(self._peers, peer)) for peer in self._peers)
        return {peer: Ban(each.banned_until_s - now_s, each.reason) for peer, each in known if each.is_banned(now_s)}
