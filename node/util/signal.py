"""An auto-reset event: one task waits for work, others announce it."""

import trio


class Signal:
    """Wakes the task that waits; a `set` with nobody waiting ends the next `wait`."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Wake the waiting task, or the next one that waits."""
        self._event.set()

    async def wait(self) -> None:
        """Wait until `set` was called since the last return from here."""
        await self._event.wait()
        self._event = trio.Event()

    def clear(self) -> None:
        """Forget a `set` that no task has waited for yet."""
        self._event = trio.Event()
