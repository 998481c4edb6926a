"""Runs models' tokenizers and chat templates in child processes with limits, one process for each model.

They are untrusted files, which may loop for ever, fill the memory, or crash the process that reads them. All of that
costs the request that met it one line, and a new process for the next one. A process serves one request at a time;
waiting requests are served by priority, so that text under way does not wait for long prompts, and those of different
askers in turn. Processes are started on demand and end when idle; an open model needs none.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgpack
import structlog
import trio

from node.models.errors import (
    ChatTemplateError,
    ModelError,
    TokenizerBusyError,
    TokenizerEndedError,
    TokenizerUnavailableError,
)
from node.models.manifest import TOKENIZER_FILE
from node.models.store import Package
from node.models.tokenizer_process import COMMAND, RequestFailed, TokenizerProcess
from node.models.tokenizer_queue import Call, CallQueue
from node.models.vocabulary import CHANNEL_MARK, NO_TOKENS, Vocabulary
from node.util.child_process import Child, ChildError
from node.util.signal import Signal
from node.util.text import one_line
from protocol.limits import MAX_POSITIONS

MAX_PROCESSES: Final = 4
"""Beyond them the least recently used one makes room."""

MAX_WAITING: Final = 256
"""Requests of one asker that wait for a model's process; one more is refused."""

IDLE_S: Final = 120.0
"""A process that is idle for so long ends."""

NO_TOKENIZER: Final = "the model has no tokenizer: give it token ids (the API takes a list of them as prompt)"

_ATTEMPTS = 2

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on interpreting a model's files.

    Seconds are of processor time; `wall_factor` times as many may pass while other processes have the processor.
    `work_bytes`: of address space, beyond the loaded tokenizer. `load_bytes`: to load it, plus
    `load_bytes_per_byte` for each byte of its file.
    """

    load_s: float = 30.0
    render_s: float = 5.0
    encode_s: float = 10.0
    decode_s: float = 2.0
    wall_factor: float = 4.0
    work_bytes: int = 768 << 20
    load_bytes: int = 512 << 20
    load_bytes_per_byte: int = 32


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
        # Those with a process, least recently used first.
        self._alive: list[_Worker] = []
        self._room = trio.Semaphore(max_processes)

    async def run(self) -> None:
        """Run the processes on demand until cancelled; then none is left."""
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
        vocabulary = Vocabulary.from_map(facts["vocabulary"])
        return ModelTokenizer(
            worker,
            self.limits,
            vocabulary,
            tuple(facts["stop_tokens"]),
            facts["has_chat_template"],
            facts["tool_format"],
            facts["reasons"],
            facts["reasoning_tokens"] and tuple(facts["reasoning_tokens"]),
            dict(facts["marks"]),
            facts["chat_template"],
        )

    def pids(self) -> tuple[int, ...]:
        """Return the ids of the running processes."""
        return tuple(worker.pid for worker in self._alive if worker.pid is not None)

    async def wait_running(self) -> None:
        """Wait until there can be processes."""
        await self._running.wait()

    def start_soon(self, worker: "_Worker") -> None:
        """Start serving a worker's requests. Raises TokenizerEndedError when the node ends."""
        if self._nursery is None:
            raise TokenizerEndedError
        self._nursery.start_soon(worker.serve)

    def watch(self, child: Child) -> None:
        """Drain a process's stderr for as long as it lives: else it would stop when the pipe is full."""
        if self._nursery is not None:
            self._nursery.start_soon(partial(child.relay_stderr, show=False))

    async def admit(self, worker: "_Worker") -> None:
        """Wait, in turn, until a worker may start a process; an idle one makes room."""
        if not self._room.value and (idle := next((each for each in self._alive if each.is_idle), None)) is not None:
            idle.retire()
        await self._room.acquire()
        self._alive.append(worker)

    def must_yield(self, worker: "_Worker") -> bool:
        """Return whether another model waits for a process, and this worker's is the least recently used."""
        return bool(self._room.statistics().tasks_waiting) and self._alive[:1] == [worker]

    def used(self, worker: "_Worker") -> None:
        """Record that a worker was used."""
        self._alive.remove(worker)
        self._alive.append(worker)

    def released(self, worker: "_Worker") -> None:
        """Record that a worker's process has ended: the longest waiting worker may start one."""
        self._alive.remove(worker)
        self._room.release()


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A model's tokenizer, made by `TokenizerService.open`; without a worker, that of a model without tokenizer."""

    _worker: "_Worker | None"
    _limits: Limits
    vocabulary: Vocabulary
    """The bytes of tokens, known without asking the process."""
    stop_tokens: tuple[int, ...]
    """Token ids after which the model has nothing more to say."""
    has_chat_template: bool
    """Whether conversations can be rendered."""
    tool_format: str | None = None
    """How the model writes tool calls, by its chat template: `harmony`, `hermes`, `llama3`, `mistral`, or None."""
    reasons: bool = False
    """Whether the model writes reasoning, in `<think>` or a channel."""
    reasoning_tokens: tuple[int, int] | None = None
    """The tokens that begin and end it, if `<think>` and `</think>` are one token each."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """Special tokens that mark reasoning and tool calls, which `decode` leaves out."""
    chat_template: str = ""
    """Its text; empty where there is none."""
    _asker: str = ""

    @property
    def has_channels(self) -> bool:
        """Whether the model writes in channels, as gpt-oss does."""
        return CHANNEL_MARK in self.marks.values()

    @property
    def is_absent(self) -> bool:
        """Whether the model has no tokenizer: it is given token ids, and answers in token ids."""
        return self._worker is None

    def asked_by(self, asker: str) -> "ModelTokenizer":
        """Return the same tokenizer for requests of an asker, which wait in turn with those of others."""
        return replace(self, _asker=asker)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return a text's token ids, with the tokens that the model wants around a text (such as BOS) by default.

        Raises ModelError.
        """
        request = {"do": "encode", "text": text, "add_special_tokens": add_special_tokens, "max_tokens": MAX_POSITIONS}
        answer = await self._ask("the model's tokenizer", request, self._limits.encode_s)
        return tuple(array("I", answer["tokens"]))

    async def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Return the prompt tokens of a conversation: mappings with `role` and `content`.

        Raises ChatTemplateError, a ValueError, where the model has no chat template or its template refuses or takes
        too long; ModelError.
        """
        return await self.encode(await self.render_chat_text(messages), add_special_tokens=False)

    async def render_chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt of a conversation as text, special tokens included.

        `tools`: descriptions as in the OpenAI API. `options`: further variables of the template.
        `continue_final_message`: the prompt ends where the last message does, which the model continues.
        Raises ChatTemplateError and ModelError.
        """
        if self.is_absent:
            raise ModelError(NO_TOKENIZER)
        if not self.has_chat_template:
            raise ChatTemplateError("the model has no chat template: give it a plain prompt")
        request = {
            "do": "render",
            "messages": [dict(message) for message in messages],
            "tools": [dict(tool) for tool in tools],
            "options": dict(options or {}),
            "continue_final_message": continue_final_message,
        }
        text: str = (await self._ask("the model's chat template", request, self._limits.render_s))["text"]
        return text

    async def schema_fault(self, schema: str) -> str:
        """Return why texts cannot follow a JSON Schema; empty if they can. Raises ModelError."""
        request = {"do": "check_schema", "schema": schema}
        fault: str = (await self._ask("the JSON Schema", request, self._limits.decode_s))["fault"]
        return fault

    async def decode(self, *sequences: Sequence[int]) -> list[str]:
        """Return the texts of sequences of tokens, without special tokens. Raises ModelError."""
        request = {"do": "decode", "sequences": [array("I", tokens).tobytes() for tokens in sequences]}
        answer = await self._ask("the model's tokenizer", request, self._limits.decode_s, priority=0)
        return list(answer["texts"])

    async def token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the bytes of tokens, each by itself, special tokens by their names. Raises ModelError."""
        request = {"do": "token_bytes", "tokens": array("I", tokens).tobytes()}
        answer = await self._ask("the model's tokenizer", request, self._limits.decode_s, priority=0)
        return list(answer["texts"])

    async def _ask(
        self, subject: str, request: Mapping[str, Any], cpu_s: float, *, priority: int = 1
    ) -> dict[str, Any]:
        if self._worker is None:
            raise ModelError(NO_TOKENIZER)
        return await self._worker.ask(subject, request, cpu_s, priority=priority, asker=self._asker)


def no_tokenizer(eos_token_ids: tuple[int, ...] = ()) -> ModelTokenizer:
    """Return the tokenizer of a model without one: it refuses text."""
    return ModelTokenizer(None, Limits(), NO_TOKENS, eos_token_ids, False)


class _Worker:
    """The requests of one model, and the process that answers them while there are any."""

    def __init__(self, service: TokenizerService, load: Mapping[str, Any]) -> None:
        self._service = service
        self._load = load
        self._is_first = True
        self._waiting = CallQueue()
        self._arrived = Signal()
        self._serving = False
        self._idle_scope: trio.CancelScope | None = None
        self._process: TokenizerProcess | None = None

    @property
    def is_idle(self) -> bool:
        return self._idle_scope is not None and not self._waiting

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.child.process.pid

    def retire(self) -> None:
        """End the process of an idle worker, soon; the next request starts another."""
        if self._idle_scope is not None:
            self._idle_scope.cancel()

    async def ask(
        self, subject: str, request: Mapping[str, Any], cpu_s: float, *, priority: int = 1, asker: str = ""
    ) -> dict[str, Any]:
        """Return the answer to a request; raise ModelError, or ChatTemplateError where a template is at fault."""
        await self._service.wait_running()
        try:
            size_bytes = len(msgpack.packb(request))
        except (ValueError, OverflowError) as error:  # half a surrogate pair, an integer beyond 64 bits
            raise ModelError(f"{subject} cannot take this input: {one_line(error)}") from None
        # Texts under way, one for each job, are never refused.
        if priority and self._waiting.count(asker) >= MAX_WAITING:
            raise TokenizerBusyError(f"{MAX_WAITING} requests wait for the model's tokenizer; try again later")
        if not self._serving:
            self._service.start_soon(self)
            self._serving = True
        call = self._waiting.add(priority, asker, size_bytes, subject, {**request, **self._limits(cpu_s)})
        self._arrived.set()
        try:
            await call.over.wait()
        finally:
            call.abandoned = True
        if isinstance(call.outcome, Exception):
            raise call.outcome
        return call.outcome

    async def serve(self) -> None:
        """Serve requests until there has been none for a while."""
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
            # Requests from here on are served by another task with another process.
            self._serving = False
            await self._end()

    async def _next(self) -> Call | None:
        while True:
            if self._process is not None and self._service.must_yield(self):
                await self._end()
            if (call := self._waiting.take()) is not None:
                return call
            with trio.move_on_after(self._service.idle_s) as self._idle_scope:
                if self._process is not None:
                    self._service.used(self)
                await self._arrived.wait()
            is_over = self._idle_scope.cancelled_caught
            self._idle_scope = None
            if is_over and not self._waiting:
                return None

    async def _serve_call(self, call: Call) -> None:
        for _ in range(_ATTEMPTS):
            try:
                call.outcome = await self._exchange(call)
            except ChildError as error:  # the process cannot be started
                call.outcome = TokenizerUnavailableError(str(error))
            except RequestFailed as failure:
                is_template = call.request["do"] == "render"
                call.outcome = ChatTemplateError(str(failure)) if is_template else ModelError(str(failure))
                if failure.is_fatal and self._process is not None:
                    folder = Path(self._load["folder"]).name
                    _logger.warning("tokenizer process ended", folder=folder, reason=str(failure))
                    await self._end()
                if failure.may_retry:
                    continue
            except Exception as error:  # a defect costs its own request: others wait for this task
                _logger.exception("tokenizer request failed")
                call.outcome = TokenizerUnavailableError(f"{call.subject} failed: {one_line(error)}")
                await self._end()
            return

    async def _exchange(self, call: Call) -> dict[str, Any]:
        is_load = call.request["do"] == "load"
        if is_load:
            await self._end()
        if self._process is None:
            loaded = await self._start()
            if is_load:
                return loaded
        assert self._process is not None
        return await self._process.exchange(call.request, call.subject)

    async def _start(self) -> dict[str, Any]:
        """Start a process, and have it load the tokenizer. Raises ChildError and RequestFailed."""
        await self._service.admit(self)
        try:
            self._process = await TokenizerProcess.start(self._service.command)
            self._service.watch(self._process.child)
            request = {**self._load, **self._limits(self._service.limits.load_s), "is_first": self._is_first}
            request["memory_bytes"] = self._load["load_bytes"]
            answer = await self._process.exchange(request, "the model's tokenizer")
        except BaseException:
            if self._process is None:
                self._service.released(self)
            await self._end()
            raise
        self._is_first = False
        return answer

    async def _end(self) -> None:
        """End the process, if there is one; the next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            try:
                await process.child.kill()
            finally:
                self._service.released(self)

    def _limits(self, cpu_s: float) -> dict[str, float]:
        limits = self._service.limits
        return {"cpu_s": cpu_s, "wall_s": cpu_s * limits.wall_factor, "memory_bytes": limits.work_bytes}
