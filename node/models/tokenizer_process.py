"""A child process that interprets one model's tokenizer and chat template under limits; see `tokenizer_worker`."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgpack
import trio

from node.util.child_process import Child, start
from node.util.interpreter import child_environment, python

COMMAND: Final = python("-m", "node.models.tokenizer_worker")
MAX_ANSWER_BYTES: Final = 64 << 20

_GRACE_S = 2.0
"""After its time is up, the kernel has this long to kill a process."""
_RECEIVE_BYTES = 256 << 10

# Untrusted templates get nothing of the user's environment, API keys least of all. One may ask for the date.
_INHERITED: Final = ("LANG", "LC_ALL", "LC_CTYPE", "TZ")
_CHANGES: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


class RequestFailed(Exception):
    """A request has no answer. The message is one line.

    `is_fatal`: the process must be replaced. `may_retry`: another process may answer, as an earlier request may be at
    fault.
    """

    def __init__(self, message: str, *, is_fatal: bool = True, may_retry: bool = False) -> None:
        super().__init__(message)
        self.is_fatal = is_fatal
        self.may_retry = may_retry


class TokenizerProcess:
    """One child process, which serves one request at a time."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._answers = msgpack.Unpacker(max_buffer_size=MAX_ANSWER_BYTES)

    @classmethod
    async def start(cls, command: Sequence[str]) -> "TokenizerProcess":
        """Start a process. Raises ChildError."""
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment = child_environment(_CHANGES, base=inherited)
        return cls(await start(command, what="its process", environment=environment, stdin=True, stdout=True))

    async def exchange(self, request: Mapping[str, Any], subject: str) -> dict[str, Any]:
        """Return the answer to a request. Raises RequestFailed, which begins with `subject`."""
        answer = await self._answer(request, subject)
        match answer.get("error"):
            case None:
                return answer
            case "memory":
                raise RequestFailed(f"{subject} needs more than {request['memory_bytes'] >> 20} MiB of memory",
                                    may_retry=request["do"] != "load")  # fmt: skip
            case error:
                raise RequestFailed(answer["message"], is_fatal=error == "panic")

    async def _answer(self, request: Mapping[str, Any], subject: str) -> dict[str, Any]:
        too_slow = RequestFailed(f"{subject} took longer than {request['cpu_s']:g} s")
        with trio.move_on_after(request["wall_s"] + _GRACE_S):
            try:
                await self.child.stdin.send_all(msgpack.packb(request))
                while data := await self.child.stdout.receive_some(_RECEIVE_BYTES):
                    self._answers.feed(data)
                    for answer in self._answers:
                        return dict(answer)
            except msgpack.BufferFull:
                failure = f"its answer has more than {MAX_ANSWER_BYTES} bytes"
                raise RequestFailed(f"{subject} failed: {failure}", may_retry=True) from None
            except trio.BrokenResourceError:
                pass
            reason = await self.child.exit_reason()
            if self.child.process.returncode in {-signal.SIGPROF, -signal.SIGALRM}:  # of its timers
                raise too_slow
            raise RequestFailed(f"{subject} failed: {reason}", may_retry=True)
        raise too_slow
