"""Which tokens a JSON Schema admits next, in processes with limits: `python -m node.engine.constraint_worker …`.

A schema is untrusted, and the library that interprets it walks the vocabulary for each token. Its own limits bound
the steps of that; the kernel bounds time and memory besides, by killing a process, which has no state that could not be
made again. Loading the tokenizer takes a second: the process that has done so forks the one that serves, and where that
dies it says so and forks the next one at once.

Started by `constraint.py`; frames are a length and a map of msgpack. The first one says that it is ready, or why not.

| request | answer |
|---|---|
| mask: call, id, schema where it is new here, keep, tokens | call, mask, and ends; or error; or died |
| close: id | none |

`keep`: so many of the tokens given so far stay. `mask`: a bit for each token, the lowest first. `ends`: whether the
text is complete.
"""

import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import llguidance
import msgpack

from node.engine.constraint import LENGTH, OUT_OF_TIME, send_frame
from node.models.json_schema import make_matcher
from node.util.text import one_line

LOAD_CPU_S: Final = 30.0
STEP_CPU_S: Final = 1.0
"""Limit of processor time of one request. What schemas in use take is some milliseconds."""

MASK_CPU_S: Final = 0.05
FREE_CPU_S: Final = 1.0
"""A text may take this much processor time for each mask, and once this much more: other texts wait for it."""

WORK_BYTES: Final = 512 << 20
"""Address space beyond the loaded tokenizer."""


class _Text:
    """A text that follows a schema."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, schema: str) -> None:
        self._matcher = make_matcher(tokenizer, schema)
        self._length = 0
        self._ends = tokenizer.eos_tokens
        self._left_s = FREE_CPU_S

    def mask(self, keep: int, tokens: list[int]) -> dict[str, Any]:
        """Return what may come after the kept tokens and further ones. Raises ValueError."""
        began_s = time.process_time()
        if keep < self._length:
            self._matcher.rollback(self._length - keep)
        consumed = self._matcher.try_consume_tokens(tokens) if tokens else 0
        self._length = keep + consumed
        mask = b"" if self._matcher.is_error() else self._matcher.compute_bitmask()
        if self._matcher.is_error() or consumed < len(tokens):
            raise ValueError(self._matcher.get_error() or "the tokens so far do not follow the schema")
        admitted = bytearray(mask)
        for token in self._ends:  # with which tokens a text ends is up to the job
            admitted[token // 8] &= ~(1 << token % 8)
        self._left_s = min(FREE_CPU_S, self._left_s + MASK_CPU_S - (time.process_time() - began_s))
        if self._left_s < 0:
            raise ValueError("it takes too much time: use a simpler one")
        return {"mask": bytes(admitted), "ends": self._matcher.is_accepting()}


def main() -> None:
    """Serve a socket; arguments are its number, the tokenizer's file, and the size of the vocabulary."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for kind, bound in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(kind, (bound, bound))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, LOAD_CPU_S)
    try:
        tokenizer = llguidance.LLTokenizer(sys.argv[2], n_vocab=int(sys.argv[3]))
    except MemoryError:
        raise  # another node may have more
    except BaseException as error:  # noqa: BLE001  # a panic of the library's Rust code is not an Exception
        send_frame(connection, {"error": f"its tokenizer cannot be read: {one_line(error)}"})
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    _limit_memory()
    send_frame(connection, {"ready": True})
    while why := _serve_in_child(connection, tokenizer):
        send_frame(connection, {"died": why})


def _serve_in_child(connection: socket.socket, tokenizer: llguidance.LLTokenizer) -> str:
    """Serve requests in a process of their own; return why it died, or nothing where no more come."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            _serve(connection, tokenizer)
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    if os.WIFSIGNALED(ended):
        number = os.WTERMSIG(ended)
        return OUT_OF_TIME if number == signal.SIGPROF else signal.Signals(number).name
    return "out of memory" if os.WEXITSTATUS(ended) else ""


def _serve(connection: socket.socket, tokenizer: llguidance.LLTokenizer) -> None:
    texts: dict[int, _Text] = {}
    frames = connection.makefile("rb")
    while prefix := frames.read(LENGTH.size):
        request = msgpack.unpackb(frames.read(*LENGTH.unpack(prefix)))
        if request["do"] == "close":
            texts.pop(request["id"], None)
            continue
        signal.setitimer(signal.ITIMER_PROF, STEP_CPU_S)
        answer = _answer(tokenizer, texts, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send_frame(connection, answer | {"call": request["call"]})


def _answer(tokenizer: llguidance.LLTokenizer, texts: dict[int, _Text], request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "schema" not in request and request["id"] not in texts:
            return {"died": "the process before held the text"}
        if "schema" in request:
            texts[request["id"]] = _Text(tokenizer, request["schema"])
        return texts[request["id"]].mask(request["keep"], request["tokens"])
    except ValueError as error:
        return {"error": str(error)}


def _limit_memory() -> None:
    with suppress(ValueError, OSError):  # as on macOS, which has no such limit
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + WORK_BYTES, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
