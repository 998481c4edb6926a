"""Starts and ends the child processes of a node and of its command line.

The last line on a child's stderr is part of the error. Children of a node have a session of their own, so that Ctrl-C
reaches only the node, which ends them. Which interpreter they run, and what it imports: `interpreter.py`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Final

import trio

from node.util.interpreter import child_environment

MAX_LINE_CHARACTERS: Final = 300
"""Of the last line on stderr that is part of an error."""

_TAIL_BYTES: Final = 4096
_EXIT_LIMIT_S: Final = 5.0
"""How long a child that closed its pipes may take to exit."""
_STDERR_LIMIT_S: Final = 0.5
"""How long the rest of a dead child's stderr is waited for: its own children may hold the pipe open."""
_STDERR: Final = 2
_ADVICE: Final = "note: run with `RUST_BACKTRACE"
"""The uninformative last line of every crashed Rust program."""


def _write_to_stderr(what: str, line: bytes) -> None:
    del what
    with suppress(OSError):
        os.write(_STDERR, line)


relay_line: Callable[[str, bytes], None] = _write_to_stderr
"""Shows a line that a child wrote to its stderr; a log in JSON replaces it, as that must have nothing else."""


class ChildError(Exception):
    """A child process failed. The message is one line; `last_line` is the last one of its stderr."""

    def __init__(self, message: str, last_line: str = "") -> None:
        super().__init__(f"{message}: {last_line}" if last_line else message)
        self.last_line = last_line


async def run(
    command: Sequence[str],
    *,
    what: str,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    time_limit_s: float,
) -> bytes:
    """Run a child to its end and return its stdout; it is killed when it takes longer, or when this is cancelled.

    Errors begin with `what`, the child in words. Raises ChildError.
    """
    with trio.move_on_after(time_limit_s):
        try:
            done = await trio.run_process(
                command,
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=child_environment() if environment is None else environment,
                start_new_session=True,
                deliver_cancel=_kill,
            )
        except OSError as error:
            raise _cannot_start(what, error) from None
        _check(what, done.returncode, done.stderr)
        return done.stdout
    raise ChildError(f"{what} took longer than {time_limit_s:g} s")


def run_blocking(command: Sequence[str], *, what: str, time_limit_s: float) -> str:
    """Run a child to its end and return its stdout, for callers that may block; see `run`."""
    with running(command, what=what) as child:
        try:
            stdout, _ = child.process.communicate(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            raise ChildError(f"{what} took longer than {time_limit_s:g} s") from None
        child.check()
        return stdout


class Child:
    """A long-lived child process. Made by `start`; its owner kills it at the end."""

    def __init__(self, what: str, process: trio.Process, stderr: trio.abc.ReceiveStream | None) -> None:
        self.what = what
        """The child in words."""
        self.process = process
        self._stderr = stderr
        self._tail = b""
        self._relaying = False
        self._stderr_ended = trio.Event()

    @property
    def stdin(self) -> trio.abc.SendStream:
        """The child's stdin, if it was started with a pipe."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> trio.abc.ReceiveStream:
        """The child's stdout, if it was started with a pipe."""
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def last_line(self) -> str:
        """The last line of the child's stderr that was read."""
        return _last_line(self._tail)

    async def relay_stderr(self, *, show: bool = True) -> None:
        """Read the child's stderr, and show it on ours, until it ends or this is cancelled.

        Without it the child blocks when the pipe is full.
        """
        if self._stderr is None:
            return
        self._relaying = True
        unfinished = b""
        try:
            while data := await self._stderr.receive_some():
                self._tail = (self._tail + data)[-_TAIL_BYTES:]
                *lines, unfinished = (unfinished + data).split(b"\n")
                if show:
                    for line in lines:
                        relay_line(self.what, line + b"\n")
                # A line without an end is shown in parts.
                if show and len(unfinished) > _TAIL_BYTES:
                    relay_line(self.what, unfinished)
                    unfinished = b""
            self._stderr_ended.set()
        except trio.ClosedResourceError:
            self._stderr_ended.set()
        finally:
            self._relaying = False
            if show and unfinished:
                relay_line(self.what, unfinished)

    async def exit_reason(self) -> ChildError:
        """Return why a child that closed its pipes exited."""
        with trio.move_on_after(_EXIT_LIMIT_S):
            await self.process.wait()
        with trio.move_on_after(_STDERR_LIMIT_S):
            if self._relaying:
                await self._stderr_ended.wait()
            else:
                await self.relay_stderr(show=False)
        return _ended(self.what, self.process.returncode, self._tail)

    async def kill(self) -> None:
        """End the process, also under cancellation."""
        with trio.CancelScope(shield=True):
            self.process.kill()
            await self.process.wait()
            for stream in (self.process.stdin, self.process.stdout, self._stderr):
                if stream is not None:
                    await stream.aclose()


async def start(
    command: Sequence[str],
    *,
    what: str,
    environment: Mapping[str, str] | None = None,
    stdin: bool = False,
    stdout: bool = False,
    log: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> Child:
    """Start a long-lived child. Raises ChildError.

    `stdin` and `stdout`: whether there is a pipe; else it reads nothing, and its stdout goes where its stderr goes: to
    the file `log`, or to `Child.relay_stderr`.
    """
    read_end, write_end = os.pipe() if log is None else (-1, log.fileno())
    try:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout else write_end,
            stderr=write_end,
            pass_fds=pass_fds,
            env=child_environment() if environment is None else environment,
            start_new_session=True,
        )
    except BaseException as error:
        if log is None:
            os.close(read_end)
        if isinstance(error, OSError):
            raise _cannot_start(what, error) from None
        raise
    finally:
        if log is None:
            os.close(write_end)
    return Child(what, process, None if log is not None else trio.lowlevel.FdStream(read_end))


@dataclass(frozen=True, slots=True)
class BlockingChild:
    """A child process of a caller that may block, made by `running`."""

    what: str
    process: subprocess.Popen[str]
    _stderr: IO[bytes]

    def check(self) -> None:
        """Wait for the exit; raise ChildError unless it succeeded."""
        code = self.process.wait()
        self._stderr.seek(0)
        _check(self.what, code, self._stderr.read())

    def check_ended(self, time_limit_s: float) -> None:
        """Raise ChildError if the process fails within a time."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(time_limit_s)
            self.check()


@contextmanager
def running(
    command: Sequence[str],
    *,
    what: str,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    own_session: bool = False,
) -> Iterator[BlockingChild]:
    """Run a child inside the block, with its stdout as text; it is killed when the block is left early.

    `own_session`: whether it is shielded from Ctrl-C. Raises ChildError.
    """
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                command,
                env=child_environment() if environment is None else environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=pass_fds,
                start_new_session=own_session,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise _cannot_start(what, error) from None
        with process:
            try:
                yield BlockingChild(what, process, stderr)
            finally:
                process.kill()


async def _kill(process: trio.Process) -> None:
    process.kill()


def _cannot_start(what: str, error: OSError) -> ChildError:
    return ChildError(f"{what} cannot be started: {error.strerror or error}")


def _check(what: str, code: int, stderr: bytes) -> None:
    if code != 0:
        raise _ended(what, code, stderr)


def _ended(what: str, code: int | None, stderr: bytes) -> ChildError:
    last_line = _last_line(stderr)
    if code is None:
        return ChildError(f"{what} closed its pipes", last_line)
    if code >= 0:
        return ChildError(f"{what} exited with {code}", last_line)
    if -code == signal.SIGKILL:  # from outside, or for lack of memory: its stderr has no reason
        return ChildError(f"{what} was killed by SIGKILL")
    return ChildError(f"{what} was killed by {signal.Signals(-code).name}", last_line)


def _last_line(data: bytes) -> str:
    lines = [line.strip() for line in data.decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith(_ADVICE)), "")[:MAX_LINE_CHARACTERS]


def report(**line: object) -> None:
    """Write a line of JSON to stdout, by which a child reports progress, results and errors."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
