"""Texts that follow a JSON Schema: the last stage draws only tokens with which they still can.

The schemas are interpreted in a child process with limits, see `constraint_worker`. What it holds follows from schema
and tokens: after a rollback, a replay, or the end of the process it is made again, so that draws stay the same.
"""

import itertools
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import numpy.typing as npt

from node.engine.interface import EngineError
from node.util.text import one_line

START_TIMEOUT_S: Final = 30.0
STEP_TIMEOUT_S: Final = 3.0
"""Longest wait for an answer; beyond it the process is replaced, and the text that it was for is given up."""

LENGTH: Final = struct.Struct("<I")
"""Of a frame, before it."""

_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")

Mask = npt.NDArray[np.bool_]
"""Whether each token may come next; shape (vocabulary,)."""


class ConstraintProcess:
    """The child process of one span, started when a text needs it."""

    def __init__(self, tokenizer_file: Path | None, vocabulary_size: int) -> None:
        self._tokenizer_file = tokenizer_file
        self._vocabulary_size = vocabulary_size
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._ids = itertools.count()
        self.generation = 0
        """Counts processes: what the one before held is gone."""

    def open(self, schema: str) -> "Constraint":
        """Return the constraint of a new text; the process begins to interpret the schema. Raises EngineError."""
        constraint = Constraint(self, next(self._ids), schema)
        constraint.begin()
        return constraint

    def send(self, request: dict[str, Any]) -> None:
        """Send a request. Raises EngineError."""
        connection = self._connection or self._start()
        try:
            _send(connection, request)
        except OSError as error:
            self._end()
            raise EngineError(f"the JSON Schema could not be interpreted: {one_line(error)}") from None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request. Raises EngineError."""
        self.send(request)
        assert self._connection is not None
        try:
            (length,) = LENGTH.unpack(_receive(self._connection, LENGTH.size))
            answer: dict[str, Any] = msgpack.unpackb(_receive(self._connection, length))
        except (OSError, EOFError):
            self._end()
            raise EngineError("the JSON Schema takes too much time or memory: use a simpler one") from None
        self._connection.settimeout(STEP_TIMEOUT_S)  # it has started: from now on it is expected to be fast
        if "error" in answer:
            raise EngineError(f"the JSON Schema cannot be followed: {one_line(answer['error'], 300)}")
        return answer

    def mask_of(self, data: bytes) -> Mask:
        """Return a mask from its bits."""
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(np.bool_)
        mask = np.zeros(self._vocabulary_size, np.bool_)
        count = min(len(bits), self._vocabulary_size)
        mask[:count] = bits[:count]
        return mask

    def _start(self) -> socket.socket:
        """Start a process. Raises EngineError."""
        if self._tokenizer_file is None or not self._tokenizer_file.is_file():
            raise EngineError("texts cannot follow a JSON Schema here: this node lacks the model's tokenizer")
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), str(self._tokenizer_file), str(self._vocabulary_size)]
            command = [sys.executable, "-m", "node.engine.constraint_worker", *arguments]
            environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
            nothing = subprocess.DEVNULL
            self._child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=nothing, stdout=nothing, stderr=nothing
            )
        ours.settimeout(START_TIMEOUT_S)
        self._connection = ours
        return ours

    def close(self) -> None:
        """End the process, if there is one."""
        self._end()

    def _end(self) -> None:
        self.generation += 1
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._connection = None


class Constraint:
    """The JSON Schema of one text, and the tokens that the process knows of it."""

    def __init__(self, process: ConstraintProcess, number: int, schema: str) -> None:
        self._process = process
        self._number = number
        self._schema = schema
        self._known: list[int] = []
        self._generation = -1

    def begin(self) -> None:
        """Have the process interpret the schema. Raises EngineError."""
        self._process.send({"do": "open", "id": self._number, "schema": self._schema})
        self._known, self._generation = [], self._process.generation

    def allowed(self, text: Sequence[int]) -> tuple[Mask, bool]:
        """Return which tokens may follow those of a text, and whether it may end there. Raises EngineError."""
        if self._generation != self._process.generation:
            self.begin()
        keep = 0
        for known, token in zip(self._known, text, strict=False):
            if known != token:
                break
            keep += 1
        tokens = list(text[keep:])
        answer = self._process.ask({"do": "mask", "id": self._number, "keep": keep, "tokens": tokens})
        self._known = list(text)
        return self._process.mask_of(answer["mask"]), answer["ends"]

    def close(self) -> None:
        """Forget the text."""
        if self._generation == self._process.generation:
            with suppress(EngineError):
                self._process.send({"do": "close", "id": self._number})


def _send(connection: socket.socket, request: dict[str, Any]) -> None:
    data = msgpack.packb(request)
    connection.sendall(LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes. Raises EOFError, OSError."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
