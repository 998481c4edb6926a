"""Models' tokenizers and chat templates as the daemon has them: in child processes with limits, one for each model.

They are strangers' files, which may loop for ever, fill the memory, or end the process that reads them. All of that
costs the request that met it one line, and a new process for the next one. A process does one thing at a time; requests
that wait are asked in the order of their urgency, so that text under way does not wait for long prompts. Processes are
started when they are needed and end when they are idle; a model's requests need none to be there.
"""

import heapq
import itertools
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgpack
import structlog
import trio

from node.models.errors import ChatTemplateError, ModelError
from node.models.manifest import TOKENIZER_FILE
from node.models.store import Package
from node.models.tokenizer_wire import OUT_OF_CPU, OUT_OF_TIME, PREFIX
from node.models.vocabulary import NO_TOKENS, Vocabulary
from node.util.child_process import Child, ChildError, child_environment, python, start
from protocol.limits import MAX_POSITIONS

COMMAND: Final = python("-m", "node.models.tokenizer_worker")

MAX_PROCESSES: Final = 4
"""That live at a time. The one that was used longest ago makes room."""

MAX_WAITING: Final = 256
"""Requests of one model that wait for its process; one more is refused."""

IDLE_S: Final = 120.0
"""A process that nobody asks for so long ends."""

MAX_ANSWER_BYTES: Final = 64 << 20

NO_TOKENIZER: Final = "the model has no tokenizer: give it token ids (the API takes a list of them as prompt)"

_ATTEMPTS = 2
"""A request whose process dies is tried once more: it may have died of what was asked before."""
_GRACE_S = 2.0
"""After its time is up, a process is given so long to be killed by the kernel."""
_RECEIVE_BYTES = 256 << 10

# Nothing of the user's environment is a stranger's business, API keys least of all. A template may ask for the date.
_INHERITED: Final = ("LANG", "LC_ALL", "LC_CTYPE", "TZ")
_CHANGES: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}

_logger = structlog.get_logger(__name__)


class TokenizerUnavailableError(ModelError):
    """This node cannot run the model's tokenizer now, which is no fault of the request nor of the model's files."""


class TokenizerBusyError(TokenizerUnavailableError):
    """Too many requests wait for the same model's tokenizer. They can be made again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What interpreting a model's files may cost.

    Seconds are of processor time; `patience` times as many may pass while other processes have the processor.
    `work_bytes`: of address space, beyond what the loaded tokenizer takes. `load_bytes`: to load it, beside so many
    bytes for each byte of its file.
    """

    load_s: float = 30.0
    render_s: float = 5.0
    encode_s: float = 10.0
    decode_s: float = 2.0
    patience: float = 4.0
    work_bytes: int = 768 << 20
    load_bytes: int = 512 << 20
    load_bytes_per_byte: int = 32


@dataclass(order=True, slots=True)
class _Call:
    """A request that waits for its answer."""

    urgency: int
    number: int
    what: str = field(compare=False)
    """What of the model is at fault where there is no answer."""
    request: Mapping[str, Any] = field(compare=False)
    cpu_s: float = field(compare=False)
    over: trio.Event = field(compare=False, default_factory=trio.Event)
    abandoned: bool = field(compare=False, default=False)
    answer: dict[str, Any] | None = field(compare=False, default=None)
    failure: str = field(compare=False, default="the node is about to end")
    is_ours: bool = field(compare=False, default=True)
    """Whether the failure is this node's, not the model's."""

    def fail(self, failure: str, *, is_ours: bool = False) -> None:
        """Say what there is instead of an answer."""
        self.failure, self.is_ours = failure, is_ours


class _OutOfTime(Exception):
    """A process was ended because a request took too long."""


class _Died(Exception):
    """A process ended in the middle of a request. The message says of what."""


class TokenizerService:
    """Runs the processes of all models. Every call waits for `run`."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        max_processes: int = MAX_PROCESSES,
        idle_s: float = IDLE_S,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.limits = limits or Limits()
        self.idle_s = idle_s
        self.command = command
        self._running = trio.Event()
        self._nursery: trio.Nursery | None = None
        # Those with a process, the one that was used longest ago first.
        self._alive: list[_Worker] = []
        self._room = trio.Semaphore(max_processes)

    async def run(self) -> None:
        """Run the processes that are needed until cancelled; then none is left."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running.set()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def open(self, package: Package) -> "ModelTokenizer":
        """Return the tokenizer of a package, whose tokenizer files must be there. Raises ModelError."""
        manifest = package.manifest
        names = [file.name for file in manifest.tokenizer_files]
        if TOKENIZER_FILE not in names:
            return no_tokenizer(manifest.eos_token_ids)
        size_bytes = sum(file.size_bytes for file in manifest.tokenizer_files)
        load = {
            "do": "load",
            "folder": str(package.path.resolve()),
            "files": names,
            "eos_token_ids": list(manifest.eos_token_ids),
            "load_bytes": self.limits.load_bytes + self.limits.load_bytes_per_byte * size_bytes,
            "work_bytes": self.limits.work_bytes,
        }
        worker = _Worker(self, load)
        try:
            facts = await worker.ask("the model's tokenizer", {"do": "load"}, self.limits.load_s)
        except ModelError as error:
            raise ModelError(f"model {package.model_id[:12]}: {error}") from None
        return ModelTokenizer(
            worker,
            self.limits,
            Vocabulary.from_map(facts["vocabulary"]),
            tuple(facts["stop_tokens"]),
            has_chat_template=facts["has_chat_template"],
        )

    def pids(self) -> tuple[int, ...]:
        """Return the processes that live."""
        return tuple(worker.pid for worker in self._alive if worker.pid is not None)

    async def wait_running(self) -> None:
        """Wait until there can be processes."""
        await self._running.wait()

    def start_soon(self, worker: "_Worker") -> None:
        """Have a worker serve what it was asked. Raises ModelError where it is too late for that."""
        if self._nursery is None:
            raise TokenizerUnavailableError("the node is about to end")
        self._nursery.start_soon(worker.serve)

    def watch(self, child: Child) -> None:
        """Read what a process writes to stderr, for as long as it lives: else it would stop when the pipe is full."""
        if self._nursery is not None:
            self._nursery.start_soon(partial(child.relay_stderr, show=False))

    async def admit(self, worker: "_Worker") -> None:
        """Wait, in turn, until a worker may have a process; one that is idle makes room."""
        if not self._room.value and (idle := next((each for each in self._alive if each.is_idle), None)) is not None:
            idle.retire()
        await self._room.acquire()
        self._alive.append(worker)

    def must_yield(self, worker: "_Worker") -> bool:
        """Return whether another model waits for a process, and this worker has had its own for the longest."""
        return bool(self._room.statistics().tasks_waiting) and self._alive[:1] == [worker]

    def used(self, worker: "_Worker") -> None:
        """Take note that a worker was used."""
        self._alive.remove(worker)
        self._alive.append(worker)

    def released(self, worker: "_Worker") -> None:
        """Take note that a worker's process is gone: the one that has waited longest may have another."""
        self._alive.remove(worker)
        self._room.release()


class ModelTokenizer:
    """A model's tokenizer. Made by `TokenizerService.open`."""

    def __init__(
        self,
        worker: "_Worker | None",
        limits: Limits,
        vocabulary: Vocabulary,
        stop_tokens: tuple[int, ...],
        *,
        has_chat_template: bool,
    ) -> None:
        """Take what was found out of a tokenizer; without a worker it is that of a model that has none."""
        self._worker = worker
        self._limits = limits
        self.vocabulary = vocabulary
        """What is known of tokens without asking."""
        self.stop_tokens = stop_tokens
        """Token ids after which the model has nothing more to say."""
        self.has_chat_template = has_chat_template
        """Whether conversations can be rendered."""

    @property
    def is_absent(self) -> bool:
        """Whether the model has no tokenizer: it is given token ids, and answers in token ids."""
        return self._worker is None

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return a text's token ids, with the tokens that the model wants around a text (such as BOS) by default.

        Raises ModelError.
        """
        request = {
            "do": "encode",
            "text": text,
            "add_special_tokens": add_special_tokens,
            "max_tokens": MAX_POSITIONS,
        }
        answer = await self._ask("the model's tokenizer", request, self._limits.encode_s)
        return tuple(array("I", answer["tokens"]))

    async def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the prompt tokens of a conversation: mappings with `role` and `content`.

        Raises ChatTemplateError, a ValueError, where the model has no chat template or its template refuses or takes
        too long; ModelError.
        """
        return await self.encode(await self.render_chat_text(messages), add_special_tokens=False)

    async def render_chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt of a conversation as text, special tokens included.

        Raises ChatTemplateError and ModelError.
        """
        if self.is_absent:
            raise ModelError(NO_TOKENIZER)
        if not self.has_chat_template:
            raise ChatTemplateError("the model has no chat template: give it a plain prompt")
        request = {"do": "render", "messages": [dict(message) for message in messages]}
        text: str = (await self._ask("the model's chat template", request, self._limits.render_s))["text"]
        return text

    async def decode(self, *sequences: Sequence[int]) -> list[str]:
        """Return the texts of sequences of tokens, without special tokens. Raises ModelError."""
        request = {"do": "decode", "sequences": [array("I", tokens).tobytes() for tokens in sequences]}
        texts: list[str] = (await self._ask("the model's tokenizer", request, self._limits.decode_s, urgency=0))[
            "texts"
        ]
        return texts

    async def _ask(self, what: str, request: Mapping[str, Any], cpu_s: float, *, urgency: int = 1) -> dict[str, Any]:
        if self._worker is None:
            raise ModelError(NO_TOKENIZER)
        return await self._worker.ask(what, request, cpu_s, urgency=urgency)


def no_tokenizer(eos_token_ids: tuple[int, ...] = ()) -> ModelTokenizer:
    """Return what stands for the tokenizer of a model that has none."""
    return ModelTokenizer(None, Limits(), NO_TOKENS, eos_token_ids, has_chat_template=False)


class _Worker:
    """The requests of one model, and the process that answers them while there are any."""

    def __init__(self, service: TokenizerService, load: Mapping[str, Any]) -> None:
        self._service = service
        self._load = load
        self._is_first = True
        self._numbers = itertools.count()
        self._waiting: list[_Call] = []
        self._arrived = trio.Event()
        self._serving = False
        self._idle_scope: trio.CancelScope | None = None
        self._process: _Process | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it only waits for requests."""
        return self._idle_scope is not None and not self._waiting

    @property
    def pid(self) -> int | None:
        """Its process."""
        return None if self._process is None else self._process.pid

    def retire(self) -> None:
        """End the process of an idle worker, soon; the next request starts another."""
        if self._idle_scope is not None:
            self._idle_scope.cancel()

    async def ask(self, what: str, request: Mapping[str, Any], cpu_s: float, *, urgency: int = 1) -> dict[str, Any]:
        """Return the answer to a request; raise ModelError, or ChatTemplateError where a template is at fault."""
        await self._service.wait_running()
        if urgency and len(self._waiting) >= MAX_WAITING:  # texts under way, of which each job has one, go on
            raise TokenizerBusyError(f"{MAX_WAITING} requests wait for the model's tokenizer; try again later")
        if not self._serving:
            self._service.start_soon(self)
            self._serving = True
        call = _Call(urgency, next(self._numbers), what, request, cpu_s)
        heapq.heappush(self._waiting, call)
        self._arrived.set()
        try:
            await call.over.wait()
        finally:
            call.abandoned = True
        if call.answer is None and call.is_ours:
            raise TokenizerUnavailableError(call.failure)
        if call.answer is None:
            raise ChatTemplateError(call.failure) if request["do"] == "render" else ModelError(call.failure)
        return call.answer

    async def serve(self) -> None:
        """Answer what was asked, and what is asked meanwhile, until nobody asks for a while."""
        try:
            while (call := await self._next()) is not None:
                try:
                    await self._serve_call(call)
                finally:
                    call.over.set()
        except trio.Cancelled:
            for call in self._waiting:
                call.over.set()
            raise
        finally:
            # Whatever is asked from here on is served by another task with another process.
            self._serving = False
            process, self._process = self._process, None
            if process is not None:
                await self._end(process)

    async def _next(self) -> _Call | None:
        while True:
            if self._process is not None and self._service.must_yield(self):
                await self._replace("")
            while self._waiting:
                call = heapq.heappop(self._waiting)
                if not call.abandoned:
                    return call
            self._arrived = trio.Event()
            with trio.move_on_after(self._service.idle_s) as self._idle_scope:
                if self._process is not None:
                    self._service.used(self)
                await self._arrived.wait()
            self._idle_scope = None
            if not self._waiting:
                return None

    async def _serve_call(self, call: _Call) -> None:
        """Give a call its answer or its failure."""
        for _ in range(_ATTEMPTS):
            try:
                answer = await self._exchange(call)
            except _OutOfTime:
                call.fail(f"{call.what} took longer than {call.cpu_s:g} s")
                await self._replace(call.failure)
                break
            except _Died as death:
                call.fail(f"{call.what} failed: {death}")
                await self._replace(call.failure)
            except (ModelError, ChildError) as error:  # there is no process to ask
                call.fail(str(error), is_ours=isinstance(error, ChildError))
                await self._replace("")
                break
            else:
                match answer.get("error"):
                    case None:
                        call.answer = answer
                        break
                    case "memory":
                        call.fail(f"{call.what} needs more than {self._service.limits.work_bytes >> 20} MiB of memory")
                        await self._replace(call.failure)
                    case "panic":
                        call.fail(answer["message"])
                        await self._replace(call.failure)
                        break
                    case _:
                        call.fail(answer["message"])
                        break

    async def _exchange(self, call: _Call) -> dict[str, Any]:
        limits = self._service.limits
        is_load = call.request["do"] == "load"
        if is_load and self._process is not None:
            await self._replace("")
        if self._process is None:
            loaded = await self._start(is_first=self._is_first)
            if is_load:
                return loaded
        assert self._process is not None
        return await self._process.exchange({**call.request, **_times(call.cpu_s, limits)})

    async def _start(self, *, is_first: bool) -> dict[str, Any]:
        """Start a process, and have it load the tokenizer. Raises ModelError where it cannot."""
        limits = self._service.limits
        await self._service.admit(self)
        try:
            self._process = await _Process.start(self._service.command)
            self._service.watch(self._process.child)
            request = {**self._load, **_times(limits.load_s, limits), "is_first": is_first}
            answer = await self._process.exchange(request)
        except BaseException as error:
            process, self._process = self._process, None
            if process is None:
                self._service.released(self)
            else:
                await self._end(process)
            if isinstance(error, _OutOfTime):
                raise ModelError(f"the model's tokenizer took longer than {limits.load_s:g} s to load") from None
            raise
        match answer.get("error"):
            case None:
                self._is_first = False
                return answer
            case "memory":
                raise ModelError(
                    f"the model's tokenizer needs more than {self._load['load_bytes'] >> 20} MiB of memory"
                )
            case _:
                raise ModelError(answer["message"])

    async def _replace(self, reason: str) -> None:
        """End the process; the next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            if reason:
                _logger.warning("tokenizer process ended", folder=Path(self._load["folder"]).name, reason=reason)
            await self._end(process)

    async def _end(self, process: "_Process") -> None:
        try:
            await process.kill()
        finally:
            self._service.released(self)


class _Process:
    """One child process, which is asked one thing at a time."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._buffer = bytearray()

    @property
    def pid(self) -> int:
        """Its number."""
        return self.child.process.pid

    @classmethod
    async def start(cls, command: Sequence[str]) -> "_Process":
        """Start a process. Raises ChildError."""
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment = child_environment(_CHANGES, base=inherited)
        return cls(await start(command, what="its process", environment=environment, stdin=True, stdout=True))

    async def exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request. Raises _OutOfTime and _Died; then the process is to be killed."""
        data = msgpack.packb(request)
        with trio.move_on_after(request["wall_s"] + _GRACE_S):
            try:
                await self.child.stdin.send_all(PREFIX.pack(len(data)) + data)
                (size,) = PREFIX.unpack(await self._receive(PREFIX.size))
                if size > MAX_ANSWER_BYTES:
                    raise _Died(f"its answer has {size} bytes")
                answer: dict[str, Any] = msgpack.unpackb(await self._receive(size))
            except (trio.BrokenResourceError, EOFError):
                exit_reason = await self.child.exit_reason()
                if self.child.process.returncode in {-OUT_OF_CPU, -OUT_OF_TIME}:
                    raise _OutOfTime from None
                raise _Died(str(exit_reason)) from None
            return answer
        raise _OutOfTime

    async def kill(self) -> None:
        """End it, also under cancellation."""
        await self.child.kill()

    async def _receive(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = await self.child.stdout.receive_some(_RECEIVE_BYTES)
            if not data:
                raise EOFError
            self._buffer += data
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


def _times(cpu_s: float, limits: Limits) -> dict[str, float]:
    return {"cpu_s": cpu_s, "wall_s": cpu_s * limits.patience}
