"""What a worker has in memory only while sessions use it, as the node keeps account of it."""

from dataclasses import dataclass, field

import trio

from protocol.identity import SessionId

UNLOAD_AFTER_S = 30.0
"""It is unloaded when no session has used it for so long."""


@dataclass(slots=True)
class OnDemand:
    """Something that is loaded for the first session that uses it, and unloaded some time after the last."""

    is_loaded: bool = False
    sessions: set[SessionId] = field(default_factory=set)
    """Those that use it."""
    _used_s: float = 0.0

    def loaded(self) -> None:
        """Record that it is there, for a session that was about to begin."""
        self.is_loaded, self._used_s = True, trio.current_time()

    def leave(self, session: SessionId) -> None:
        """Record that a session is over; one that does not use it is ignored."""
        if session in self.sessions:
            self.sessions.remove(session)
            self._used_s = trio.current_time()

    def rename(self, session: SessionId, successor: SessionId) -> None:
        """Record that a session goes on under another id."""
        if session in self.sessions:
            self.sessions.remove(session)
            self.sessions.add(successor)

    @property
    def can_unload(self) -> bool:
        """Whether it can be unloaded."""
        return self.is_loaded and not self.sessions and trio.current_time() - self._used_s >= UNLOAD_AFTER_S
