"""Runs a verb on a terminal of its own, as a user would: keys go in, what is shown comes out."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from termios import TIOCSCTTY, TIOCSWINSZ

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>]|\][^\x07]*\x07)")
TIMEOUT_S = 20.0


class Terminal:
    """The terminal of a process."""

    def __init__(self, process: "subprocess.Popen[bytes]", descriptor: int) -> None:
        self.process = process
        self.raw = ""
        self._descriptor = descriptor

    @property
    def text(self) -> str:
        """Everything shown so far, without escape sequences."""
        return _ESCAPES.sub("", self.raw)

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        ioctl(self._descriptor, TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def interrupt(self, text: str, after: int = 0) -> int:
        """Press Ctrl-C until a text is shown, behind a place; return the place behind it.

        Once may not do: Python sees a signal that arrives just before it waits for a key only at the next key.
        """
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.text.find(text, after) < 0:
            assert time.monotonic() < deadline_s, f"{text!r} is not in {self.text[after:]!r}"
            self.type("\x03")
            if select.select([self._descriptor], [], [], 1.0)[0]:
                self._read()
        return self.wait_for(text, after)

    def wait_for(self, text: str, after: int = 0) -> int:
        """Wait until a text is shown, behind a place; return the place behind it."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while (found := self.text.find(text, after)) < 0:
            assert time.monotonic() < deadline_s, f"{text!r} is not in {self.text[after:]!r}"
            if not self._read():
                raise AssertionError(f"ended without {text!r}: {self.text[after:]!r}")
        return found + len(text)

    def wait_exit(self) -> int:
        """Wait for the end; return the exit code."""
        while self._read():
            pass
        return self.process.wait(TIMEOUT_S)

    def _read(self) -> bool:
        if not select.select([self._descriptor], [], [], TIMEOUT_S)[0]:
            raise AssertionError(f"nothing more is shown after {self.text!r}")
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the process has closed its end
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)


@contextmanager
def on_terminal(*arguments: str, columns: int = 100, lines: int = 30, prelude: str = "") -> Iterator[Terminal]:
    """Run a verb on a terminal inside the block; `prelude`: Python code that runs before it."""
    ours, theirs = pty.openpty()
    code = f"{prelude}\nimport node.cli; node.cli.main()"
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    ioctl(ours, TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        # In a session of its own whose terminal this is, so that Ctrl-C reaches it.
        preexec_fn=lambda: (os.setsid(), ioctl(0, TIOCSCTTY, 0)),  # type: ignore[func-returns-value]
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(ours)
