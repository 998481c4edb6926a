"""The worker process: `python -m node.engine.worker FD`, started by `client.py`, which has the other end of FD.

It does one thing at a time, in order of the requests, except for variants, which it builds in a thread beside them, and
the reference and what interprets JSON Schemas, which it loads in another one, as a session waits for them. It has no
state to save, and may be killed at any moment. It exits when the other end of its socket closes, also in the middle of
a forward pass.
"""

import gc
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import BufferedReader
from typing import Any, NoReturn

from node.engine.interface import REFERENCE, BadRequest, EngineError, EngineLost, NoVariantMemory, Variant
from node.engine.open_shard import open_shard
from node.engine.shard import Shard
from node.engine.worker_protocol import (
    PREFIX,
    Buffer,
    Header,
    decode_header,
    decode_session,
    decode_step,
    decode_values,
    encode_error,
    encode_frame,
    encode_loaded,
    encode_result,
)
from node.util.text import one_line

_sending = threading.Lock()
"""Steps and variants answer over the same socket."""


def main() -> None:
    """Serve the socket whose number is the first argument."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_exit_on_hang_up, args=[connection.fileno()], daemon=True).start()
    # Collecting garbage among three thousand modules would take a fifth of the time.
    gc.disable()
    frames = connection.makefile("rb")
    header, _ = _receive(frames)
    if header["do"] == "import":  # before the span is known, as the node may take as long to find it and its files
        header, _ = _receive(frames)
    source, blocks, options = decode_values(header)
    try:
        shard = open_shard(source, blocks, options)
    except EngineError as error:
        _send(connection, encode_frame({"did": "failed", "error": str(error)}))
        return
    gc.freeze()
    gc.enable()
    _send(connection, encode_loaded(shard.info, shard.variants()))
    builder = ThreadPoolExecutor(1, initializer=_yield_to_others)
    loader = ThreadPoolExecutor(1, initializer=_take_one_core)
    while True:
        header, payload = _receive(frames)
        match header["do"]:
            case "prepare":
                variant = Variant(*header["variant"])
                if not _is_done(partial(shard.start_threads, variant), header, connection):
                    continue
                thread = loader if variant == REFERENCE else builder
                thread.submit(_answer_when_done, partial(shard.prepare, variant), header, connection)
            case "constrain":
                loader.submit(_answer_when_done, shard.start_constraints, header, connection)
            case "step":
                try:
                    result = shard.step(decode_step(header, payload))
                except EngineError as error:
                    _exit_if_lost(error.__cause__)
                    _send(connection, encode_error(header["call"], error))
                    continue
                _send(connection, encode_result(header["call"], result))
            case _:
                _do_unanswered(shard, header)


def _do_unanswered(shard: Shard[Any], header: Header) -> None:
    try:
        match header["do"]:
            case "begin":
                with suppress(EngineError):  # its first slice fails as that of an unknown session
                    shard.begin(*decode_values(header))
            case "rename":
                shard.rename(decode_session(header["session"]), decode_session(header["successor"]))
            case "close":
                shard.close(decode_session(header["session"]))
            case "drop":
                shard.drop(Variant(*header["variant"]))
            case "unload":
                shard.unload_reference()
            case "unconstrain":
                shard.end_constraints()
            case "trim":
                shard.trim(header["dropped"], idle=header["idle"])
    except EngineLost as error:
        _exit_if_lost(error)


def _answer_when_done(work: Callable[[], None], header: Header, connection: socket.socket) -> None:
    if _is_done(work, header, connection):
        _send(connection, encode_frame({"did": "ready", "call": header["call"]}))


def _is_done(work: Callable[[], None], header: Header, connection: socket.socket) -> bool:
    """Do a call's work, and return whether that went well; where it fails, answer the call."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  # the span is served without this variant, or this session
        _exit_if_lost(error)
        answer = {"did": "error", "call": header["call"], "error": one_line(error)}
        answer["by_request"] = isinstance(error, BadRequest)
        answer["by_memory"] = isinstance(error, NoVariantMemory)
        _send(connection, encode_frame(answer))
        return False
    return True


def _exit_if_lost(cause: BaseException | None) -> None:
    """Exit where an engine has lost its sessions, or a GPU has failed: to this process, perhaps not to the next one."""
    if isinstance(cause, EngineLost):
        sys.stderr.write(f"{one_line(cause)}\n")
        os._exit(1)
    if "torch" not in sys.modules:
        return
    from node.engine.device_probe import is_lost

    if is_lost(cause):
        sys.stderr.write(f"the GPU is lost: {one_line(cause)}\n")
        os._exit(1)


def _yield_to_others() -> None:
    """Give this thread, and those that torch starts for it, the lowest priority."""
    if sys.platform == "linux":  # where each thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    if "torch" in sys.modules:
        _take_one_core()


def _take_one_core() -> None:
    """Have torch compute in this thread alone."""
    import torch

    torch.set_num_threads(1)


def _exit_on_hang_up(descriptor: int) -> NoReturn:
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
    poll.poll()
    os._exit(0)


def _receive(frames: BufferedReader) -> tuple[Header, memoryview]:
    header_bytes, payload_bytes = PREFIX.unpack(_read(frames, PREFIX.size))
    return decode_header(_read(frames, header_bytes)), _read(frames, payload_bytes)


def _read(frames: BufferedReader, count: int) -> memoryview:
    data = bytearray(count)
    if frames.readinto(data) < count:
        sys.exit(0)
    return memoryview(data)


def _send(connection: socket.socket, buffers: list[Buffer]) -> None:
    with _sending:
        for buffer in buffers:
            connection.sendall(buffer)


if __name__ == "__main__":
    main()
