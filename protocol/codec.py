"""Encoding of job stream messages as msgpack. docs/protocol.md lists the fields of each.

Control messages are read and written from their declarations in `protocol.messages`. The headers of steps are packed
by hand: there is one for every token. What `encode_*` returns has passed the checks of `decode_*`, so that we never
send what we would reject.
"""

import re
from dataclasses import dataclass, replace
from typing import Final, get_args

from protocol.canonical import Value, decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import array, choice, integer, job_id, tuple_of
from protocol.identity import SessionId
from protocol.limits import (
    MAX_CONTROL_BYTES,
    MAX_DRAFTS,
    MAX_POSITIONS,
    MAX_SLICES,
    MAX_STAGES,
    MAX_STEP_BYTES,
    MAX_VOCABULARY,
    MAX_WIDTH,
)
from protocol.messages import (
    LATEST_MINOR,
    ControlMessage,
    FinishReason,
    Open,
    Opened,
    Refused,
    Sampling,
    Slice,
    Step,
    TokenHistory,
)
from protocol.reports import Progress, ProgressRequest, Timings, TimingsRequest
from protocol.schema import MessageTypes
from protocol.tensors import DType, Tensor

_MESSAGES: Final = MessageTypes[ControlMessage](
    {re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(): cls for cls in get_args(ControlMessage)}
)
"""The `type` of each control message is the name of its class in snake case."""


@dataclass(frozen=True, slots=True)
class StepHeader:
    """The header of a step, which precedes its tensor on the wire."""

    slices: tuple[Slice, ...]
    dtype: DType
    shape: tuple[int, ...]

    @classmethod
    def of(cls, step: Step) -> "StepHeader":
        """Return the header of a step."""
        return cls(step.slices, step.tensor.dtype, step.tensor.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.row_bytes(*self.shape[1:])

    @property
    def payload_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape[0] * self.row_bytes

    def step(self, payload: bytes | bytearray) -> Step:
        """Return the step, given `payload_bytes` bytes. Raises RemoteProtocolError for invalid token ids."""
        tensor = Tensor(self.dtype, self.shape, payload)
        _check_tokens(tensor)
        return Step(slices=self.slices, tensor=tensor)


def encode_control(message: ControlMessage, minor: int = LATEST_MINOR) -> bytes:
    """Return the body of a control frame, in version 1.`minor`.

    Raises LocalProtocolError for a value out of bounds, and for a message that this version does not have.
    """
    if minor_of(message) > minor:
        raise LocalProtocolError(
            f"{_MESSAGES.name_of(type(message))}: not expressible in version 1.{minor} of the protocol"
        )
    try:
        return encode(_MESSAGES.to_map(message))
    except (RemoteProtocolError, ValueError) as error:
        raise LocalProtocolError(str(error)) from None


def decode_control(body: bytes | memoryview, minor: int = LATEST_MINOR) -> ControlMessage:
    """Return the message in the body of a control frame, in version 1.`minor`.

    Raises RemoteProtocolError for anything that is invalid, or unknown in this version.
    """
    message = _MESSAGES.from_map(decode(body, max_bytes=MAX_CONTROL_BYTES))
    if minor_of(message) > minor:
        raise RemoteProtocolError(
            f"{_MESSAGES.name_of(type(message))}: unknown in version 1.{minor} of the job protocol"
        )
    return message


def adapted(message: Open, minor: int) -> Open:
    """Return a message without the facts that version 1.`minor` lacks; a stage serves the session without them."""
    return message if minor >= 2 else replace(message, stage_facts=(), request_id="", trace_parent="")


def minor_of(message: ControlMessage) -> int:
    """Return the earliest version 1.x of the job protocol that can express a message."""
    if isinstance(message, TokenHistory | ProgressRequest | Progress):
        return 1
    if isinstance(message, TimingsRequest | Timings):
        return 2
    if isinstance(message, Opened):
        return 0 if message.table_digest is None else 2
    if isinstance(message, Refused):
        return 2 if message.most_positions else 0
    if isinstance(message, Open) and (message.stage_facts or message.request_id or message.trace_parent):
        return 2
    if isinstance(message, Open) and message.sampling is not None:
        sampling = message.sampling
        # prompt_logprobs come with logprobs
        if sampling.logprobs or sampling.json_schema or sampling.pooling or sampling.penalty_window:
            return 2
        plain = Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            stop_tokens=sampling.stop_tokens,
        )
        return int(sampling != plain)
    return 0


def encode_step_header(step: Step) -> bytes:
    """Return the header of a step frame. Raises LocalProtocolError for a value out of bounds."""
    try:
        fields: dict[str, Value] = {
            "dtype": step.tensor.dtype.value,
            "shape": list(step.tensor.shape),
            "slices": [_slice_to_array(part) for part in step.slices],
        }
        _step_header_from(fields)
        _check_tokens(step.tensor)
        return encode(fields)
    except (RemoteProtocolError, ValueError) as error:
        raise LocalProtocolError(str(error)) from None


def decode_step_header(header: bytes | memoryview) -> StepHeader:
    """Return the header of a step frame. Raises RemoteProtocolError."""
    return _step_header_from(decode(header, max_bytes=MAX_CONTROL_BYTES))


def _slice_to_array(part: Slice) -> list[Value]:
    finish = None if part.finish_reason is None else part.finish_reason.value
    job, stage = part.session
    return [bytes.fromhex(job), stage, part.position, part.rows, part.draws, list(part.drafts), finish]


def _slice_from(value: object) -> Slice:
    job, stage, position, rows, draws, drafts, finish = tuple_of(value, 7, "slice")
    first = integer(position, 0, MAX_POSITIONS - 1, "slice position")
    count = integer(rows, 1, MAX_POSITIONS - first, "slice rows")
    tokens = tuple(
        integer(token, 0, MAX_VOCABULARY - 1, "slice draft") for token in array(drafts, MAX_DRAFTS, "slice drafts")
    )
    if tokens and draws != len(tokens) + 1:
        raise RemoteProtocolError("slice draws: expected one more than there are drafts")
    return Slice(
        session=SessionId(job_id(job, "slice job"), integer(stage, 0, MAX_STAGES, "slice stage")),
        position=first,
        rows=count,
        draws=integer(draws, 0, count, "slice draws"),
        drafts=tokens,
        finish_reason=None if finish is None else choice(finish, FinishReason, "slice finish reason"),
    )


def _step_header_from(value: object) -> StepHeader:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "slices"}:
        raise RemoteProtocolError("step header: expected the fields dtype, shape and slices")
    dtype = choice(value["dtype"], DType, "step dtype")
    shape = array(value["shape"], 2, "step shape")
    slices = tuple(_slice_from(part) for part in array(value["slices"], MAX_SLICES, "step slices"))
    if not shape or (len(shape) == 1) != (dtype is DType.INT32):
        raise RemoteProtocolError("step shape: expected [rows] for token ids (i32) and [rows, width] for anything else")
    row_count = integer(shape[0], 1, MAX_STEP_BYTES, "step rows")
    dimensions = (row_count, *(integer(width, 1, MAX_WIDTH, "step width") for width in shape[1:]))
    header = StepHeader(slices, dtype, dimensions)
    if header.payload_bytes > MAX_STEP_BYTES:
        raise RemoteProtocolError(f"step of {header.payload_bytes} bytes: at most {MAX_STEP_BYTES} are allowed")
    if sum(part.rows for part in slices) != row_count:
        raise RemoteProtocolError(f"the slices' rows do not add up to the tensor's {row_count}")
    if len({part.session for part in slices}) != len(slices):
        raise RemoteProtocolError("a session has two slices in one step")
    return header


def _check_tokens(tensor: Tensor) -> None:
    """Raise RemoteProtocolError if a tensor of token ids holds one out of bounds."""
    if tensor.dtype is DType.INT32:
        # Read as unsigned, a negative id is a large one.
        largest = max(memoryview(tensor.data).cast("B").cast("I"))
        if largest >= MAX_VOCABULARY:
            raise RemoteProtocolError(f"a token id is not from 0 to {MAX_VOCABULARY - 1}")
