"""Failures that last, of which the log is to have one line and not one for each try."""

from typing import Final

import trio

REPEATED_S: Final = 3600.0
"""Until a failure is logged again that is still the same."""


class LastingFailure:
    """Says which occurrences of a failure are logged: the first, those for another reason, and one an hour."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._due_s = 0.0

    def is_due(self, reason: str) -> bool:
        """Note a failure; return whether it is to be logged."""
        now_s = trio.current_time()
        if reason == self._reason and now_s < self._due_s:
            return False
        self._reason, self._due_s = reason, now_s + REPEATED_S
        return True

    def ended(self) -> None:
        """Note a success: the next failure is a new one."""
        self._reason = None
