"""Texts that follow a JSON Schema: the last stage draws only tokens with which they still can.

The schemas are interpreted in child processes with limits, see `constraint_worker`. What they hold follows from schema
and tokens: after a rollback, a replay, or the death of a process it is made again, so that draws stay the same. A text
is answered for before the next one asks: so whatever kills a process that holds this text alone is its own doing.
"""

import itertools
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import msgpack
import numpy as np
import numpy.typing as npt

from node.engine.interface import BadRequest, EngineError
from node.util.interpreter import child_environment, python
from node.util.text import one_line

START_TIMEOUT_S: Final = 60.0
STEP_TIMEOUT_S: Final = 10.0
"""Longest wait for an answer, on a machine that is busy; what a schema may cost is bounded in processor time."""

LENGTH: Final = struct.Struct("<I")
"""Of a frame, before it."""

OUT_OF_TIME: Final = "out of time"
"""Why a process died whose request took too long."""

_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")

Mask = npt.NDArray[np.bool_]
"""Whether each token may come next; shape (vocabulary,)."""


class ProcessDied(EngineError):
    """The process that interprets schemas died; another one can be asked. `out_of_time`: over this request."""

    def __init__(self, reason: str, *, out_of_time: bool = False) -> None:
        super().__init__(f"the process that interprets JSON Schemas died: {reason}")
        self.out_of_time = out_of_time


class ConstraintProcess:
    """The child process of one span, started when a text needs it."""

    def __init__(self, tokenizer_file: Path | None, vocabulary_size: int) -> None:
        self._tokenizer_file = tokenizer_file
        self._vocabulary_size = vocabulary_size
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._numbers = itertools.count()
        self.generation = 0
        """Counts processes: what the one before held is gone."""

    def start(self) -> None:
        """Start the process, unless it runs, and wait until it can be asked. Raises EngineError."""
        if self._connection is not None:
            return
        if self._tokenizer_file is None or not self._tokenizer_file.is_file():
            raise EngineError("texts cannot follow a JSON Schema here: this node lacks the model's tokenizer")
        ours, theirs = socket.socketpair()
        ours.settimeout(START_TIMEOUT_S)
        with theirs:
            arguments = [str(theirs.fileno()), str(self._tokenizer_file), str(self._vocabulary_size)]
            command = python("-m", "node.engine.constraint_worker", *arguments)
            inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
            nothing = subprocess.DEVNULL
            try:
                self._child = subprocess.Popen(  # its stderr is this worker's, which the daemon logs
                    command, pass_fds=[theirs.fileno()], env=child_environment(base=inherited), stdin=nothing,
                    stdout=nothing, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise EngineError(f"JSON Schemas cannot be interpreted here: {one_line(error)}") from None
        self._connection = ours
        answer = self._receive()
        if "error" in answer:
            self.close()
            raise BadRequest(f"texts of this model cannot follow a JSON Schema: {one_line(answer['error'])}")
        ours.settimeout(STEP_TIMEOUT_S)

    def open(self, schema: str) -> "Constraint":
        """Return the constraint of a new text."""
        return Constraint(self, next(self._numbers), schema)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request. Raises EngineError."""
        self.start()
        number = next(self._numbers)
        self._send({**request, "call": number})
        while True:
            answer = self._receive()
            if "died" in answer and answer.get("call", number) == number:
                self.generation += 1
                raise ProcessDied(answer["died"], out_of_time=answer["died"] == OUT_OF_TIME)
            if answer.get("call") == number:
                break
        if "error" in answer:
            raise BadRequest(f"the JSON Schema cannot be followed: {one_line(answer['error'], 300)}")
        return answer

    def forget(self, text: int) -> None:
        """Have the process forget a text."""
        if self._connection is not None:
            with suppress(EngineError):
                self._send({"do": "close", "id": text})

    def mask_of(self, data: bytes) -> Mask:
        """Return a mask from its bits."""
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(np.bool_)
        mask = np.zeros(self._vocabulary_size, np.bool_)
        count = min(len(bits), self._vocabulary_size)
        mask[:count] = bits[:count]
        return mask

    def close(self) -> None:
        """End the process, if there is one; the next request starts another."""
        self.generation += 1
        child, connection = self._child, self._connection
        self._child = self._connection = None
        if connection is not None:
            connection.close()
        if child is not None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._connection is not None
        try:
            send_frame(self._connection, request)
        except OSError as error:
            self.close()
            raise ProcessDied(one_line(error)) from None

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        try:
            (length,) = LENGTH.unpack(_receive(self._connection, LENGTH.size))
            return dict(msgpack.unpackb(_receive(self._connection, length)))
        except TimeoutError:
            self.close()
            raise EngineError("the process that interprets JSON Schemas does not answer") from None
        except (OSError, EOFError) as error:
            self.close()
            raise ProcessDied(one_line(error)) from None


class Constraint:
    """The JSON Schema of one text, and the tokens that the process knows of it."""

    def __init__(self, process: ConstraintProcess, number: int, schema: str) -> None:
        self._process = process
        self._number = number
        self._schema = schema
        self._known = np.empty(0, np.int32)
        self._generation: int | None = None
        """The process that holds the text, if one does."""
        self.spent_s = 0.0
        """How long others have waited for its masks."""

    def allowed(self, text: Sequence[int]) -> tuple[Mask, bool]:
        """Return which tokens may follow those of a text, and whether it may end there.

        Raises BadRequest where the schema admits none or costs too much, and EngineError.
        """
        tokens = np.asarray(text, np.int32)
        began_s = perf_counter()
        try:
            answer = self._ask(tokens)
        except ProcessDied as died:
            if died.out_of_time:
                raise BadRequest("the JSON Schema takes too much time: use a simpler one") from None
            answer = self._ask_again(tokens)
        finally:
            self.spent_s += perf_counter() - began_s
        return self._process.mask_of(answer["mask"]), answer["ends"]

    def _ask_again(self, tokens: npt.NDArray[np.int32]) -> dict[str, Any]:
        """Ask a process that holds this text alone: others may have filled or killed the one before."""
        try:
            return self._ask(tokens)
        except ProcessDied:
            raise BadRequest("the JSON Schema takes too much memory: use a simpler one") from None

    def _ask(self, tokens: npt.NDArray[np.int32]) -> dict[str, Any]:
        request: dict[str, Any] = {"do": "mask", "id": self._number}
        if self._generation != self._process.generation:
            request["schema"] = self._schema
            self._known = self._known[:0]
        keep = _common_length(self._known, tokens)
        self._generation = None
        answer = self._process.ask({**request, "keep": keep, "tokens": tokens[keep:].tolist()})
        self._known, self._generation = tokens.copy(), self._process.generation
        return answer

    def close(self) -> None:
        """Forget the text."""
        if self._generation == self._process.generation:
            self._process.forget(self._number)


def _common_length(known: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> int:
    """Return how many tokens two texts begin with alike."""
    length = min(len(known), len(tokens))
    different = np.flatnonzero(known[:length] != tokens[:length])
    return int(different[0]) if len(different) else length


def send_frame(connection: socket.socket, content: Mapping[str, Any]) -> None:
    """Send a map as a frame. Raises OSError."""
    data = msgpack.packb(content)
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
