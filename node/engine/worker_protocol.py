"""Frames between the node and its worker process over a socket: a msgpack header and raw tensor bytes.

    frame = u32 header length · u64 payload length (both little-endian) · header · payload

Both ends are this very program, so unlike frames from peers these are trusted; plain values that only the node sends
(marked *) are pickled. The tensors of a frame lie in its payload one after another; the header has their dtypes and
shapes.

| from the node | header |
|---|---|
| import | what spans of safetensors files need, before one is known; at most once, and never answered |
| load | values*: source, blocks, options |
| prepare | call, variant; answered by `ready` when it is built, or the reference loaded |
| drop | variant, which no session uses; never answered |
| unload | the reference, until it is prepared again; never answered |
| constrain | call; answered by `ready` when texts can follow a JSON Schema |
| unconstrain | until it is wanted again; never answered |
| trim | dropped, the pages given up; idle, whether there are no sessions: give back unused memory; never answered |
| begin | values*: session, options, reservation; never answered: the node has reserved the pages already |
| rename | session, successor; never answered |
| close | session; never answered |
| step | call, slices, each [session, position, draws, drafts, history, dtype, shape] |

| from the worker | header |
|---|---|
| loaded | the span's info, variants |
| ready | call: the variant is built, or what was wanted is loaded |
| failed | error, a line: the span cannot be loaded |
| result | call, compute_s, tensors, each [dtype, shape], in the order of the slices; faults, left_out |
| error | call, error, a line: the step's sessions are closed, or what was wanted fails; faults, by_request, by_memory |

faults: of each slice that failed, and has no tensor, [session, error, by_rows, by_request]; its session is closed.
left_out: the session of each slice that has no tensor either, and is to be in the next step.
"""

import pickle
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import msgpack

from node.engine.interface import (
    EngineError,
    EngineOptions,
    SessionOptions,
    ShardSource,
    SliceFault,
    SliceInput,
    SliceOutput,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
)
from node.engine.kv_allocator import KvReservation
from protocol.identity import BlockRange, JobId, SessionId
from protocol.tensors import DType, Tensor

Header = dict[str, Any]
Buffer = bytes | bytearray | memoryview

PREFIX = struct.Struct("<IQ")

_JOIN_BYTES = 64 << 10
"""Up to here one send is cheaper than one for each tensor."""


def encode_frame(header: Header, tensors: Sequence[Tensor] = ()) -> list[Buffer]:
    """Return the buffers of a frame, to be sent in order."""
    packed: bytes = msgpack.packb(header)
    payload_bytes = sum(len(tensor.data) for tensor in tensors)
    buffers: list[Buffer] = [PREFIX.pack(len(packed), payload_bytes), packed, *(tensor.data for tensor in tensors)]
    return [b"".join(buffers)] if payload_bytes <= _JOIN_BYTES else buffers


def decode_header(data: Buffer) -> Header:
    """Return a frame's header."""
    header: Header = msgpack.unpackb(data, strict_map_key=False)
    return header


def split_payload(described: Iterable[tuple[str, Sequence[int]]], payload: memoryview) -> list[Tensor]:
    """Return the tensors of a payload as views of it."""
    tensors, start = [], 0
    for dtype, shape in described:
        end = start + shape[0] * DType(dtype).row_bytes(*shape[1:])
        tensors.append(Tensor(DType(dtype), tuple(shape), payload[start:end]))
        start = end
    return tensors


def decode_values(header: Header) -> Any:
    """Return the pickled values of a frame from the node, as they were given to `encode_load` or `encode_begin`."""
    return pickle.loads(header["values"])  # noqa: S301  # from the process that started this one


def encode_load(source: ShardSource, blocks: BlockRange, options: EngineOptions) -> list[Buffer]:
    """Return the frame that has a worker load a span."""
    return encode_frame({"do": "load", "values": pickle.dumps((source, blocks, options))})


def encode_loaded(info: SpanInfo, variants: Iterable[Variant]) -> list[Buffer]:
    """Return the frame of a worker that has loaded its span."""
    return encode_frame({"did": "loaded", "info": asdict(info), "variants": list(variants)})


def decode_loaded(header: Header) -> tuple[SpanInfo, frozenset[Variant]]:
    """Return the span that a worker has loaded, and the variants that are ready."""
    info = header["info"]
    variants = frozenset(Variant(*variant) for variant in header["variants"])
    return SpanInfo(**{**info, "blocks": BlockRange(**info["blocks"])}), variants


def encode_begin(session: SessionId, options: SessionOptions, reservation: KvReservation) -> list[Buffer]:
    """Return the frame that begins a session."""
    return encode_frame({"do": "begin", "values": pickle.dumps((session, options, reservation))})


def decode_session(value: Sequence[Any]) -> SessionId:
    """Return a session's id."""
    return SessionId(JobId(value[0]), value[1])


def encode_step(call: int, slices: Sequence[SliceInput]) -> list[Buffer]:
    """Return the frame of a step."""
    described = []
    for rows in slices:
        history = None if rows.history is None else list(rows.history)
        tensor = (rows.tensor.dtype, rows.tensor.shape)
        described.append((rows.session, rows.position, rows.draws, rows.drafts, history, *tensor))
    return encode_frame({"do": "step", "call": call, "slices": described}, [rows.tensor for rows in slices])


def decode_step(header: Header, payload: memoryview) -> list[SliceInput]:
    """Return the slices of a step."""
    described = header["slices"]
    tensors = split_payload(((dtype, shape) for *_, dtype, shape in described), payload)
    return [
        SliceInput(decode_session(session), position, tensor, draws, tuple(drafts), history)
        for (session, position, draws, drafts, history, *_), tensor in zip(described, tensors, strict=True)
    ]


def encode_result(call: int, result: StepResult) -> list[Buffer]:
    """Return the frame of a step's result."""
    tensors = [output.tensor for output in result.outputs]
    answer: Header = {"did": "result", "call": call, "compute_s": result.compute_s, "faults": result.faults}
    answer["left_out"] = result.left_out
    return encode_frame(answer | {"tensors": [(tensor.dtype, tensor.shape) for tensor in tensors]}, tensors)


def decode_result(header: Header, payload: memoryview, order: Sequence[SessionId]) -> StepResult:
    """Return the result of a step, whose slices belonged to these sessions."""
    faults = decode_faults(header)
    left_out = tuple(map(decode_session, header["left_out"]))
    without = {*left_out, *(fault.session for fault in faults)}
    sessions = [session for session in order if session not in without]
    tensors = split_payload(header["tensors"], payload)
    outputs = tuple(SliceOutput(session=s, tensor=tensor) for s, tensor in zip(sessions, tensors, strict=True))
    return StepResult(outputs=outputs, compute_s=header["compute_s"], faults=faults, left_out=left_out)


def encode_error(call: int, error: EngineError) -> list[Buffer]:
    """Return the frame of a step that failed."""
    faults = error.faults if isinstance(error, StepFailed) else ()
    return encode_frame({"did": "error", "call": call, "error": str(error), "faults": faults})


def decode_faults(header: Header) -> tuple[SliceFault, ...]:
    """Return which slices of a step failed, and why."""
    found = header.get("faults", ())
    return tuple(SliceFault(decode_session(session), *fault) for session, *fault in found)
