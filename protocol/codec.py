"""Messages of the job stream as msgpack maps and back. docs/protocol.md lists the fields of each.

Both directions keep the same rules: what `encode_*` returns has passed through the very checks of `decode_*`, so that
we never say what we would not accept.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Generic, TypeVar

from protocol.canonical import Value, decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.fields import (
    CONTROL_CHARACTERS,
    JOB_ID_BYTES,
    SHA256_BYTES,
    Fields,
    array,
    block_range,
    choice,
    integer,
    mapping,
    model_id,
    name,
    number,
    peer_id,
    raw,
    text,
    tuple_of,
)
from protocol.identity import JobId, PeerId, SessionId
from protocol.limits import (
    MAX_BALLOTS,
    MAX_CONTEXT,
    MAX_CONTROL_BYTES,
    MAX_DRAFTS,
    MAX_HARDWARE_BYTES,
    MAX_HISTORY_TOKENS,
    MAX_INTEGER,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_NAME_BYTES,
    MAX_NUMBER,
    MAX_PENALTY,
    MAX_POSITIONS,
    MAX_PREFIX_BYTES,
    MAX_SCORE,
    MAX_SECONDS,
    MAX_SLICES,
    MAX_STAGES,
    MAX_STEP_BYTES,
    MAX_STOP_TOKENS,
    MAX_SWITCH_BYTES,
    MAX_SWITCHES,
    MAX_TEMPERATURE,
    MAX_TEXT_BYTES,
    MAX_UINT64,
    MAX_VOCABULARY,
    MAX_VOTES,
    MAX_WIDTH,
    MAX_WINDOW_BYTES,
    PREFIX_HASH_BYTES,
    SIGNATURE_BYTES,
)
from protocol.messages import (
    LATEST_MINOR,
    Ballot,
    Begin,
    Close,
    Closed,
    Credit,
    Failed,
    FailureReason,
    FinishReason,
    Hello,
    Load,
    Open,
    Opened,
    Ping,
    Pong,
    Progress,
    ProgressRequest,
    RefusalReason,
    Refused,
    Reroute,
    Sampling,
    SessionStatistics,
    Slice,
    Step,
    TokenHistory,
)
from protocol.tensors import DType, Tensor

ControlMessage = (
    Hello
    | Open
    | Opened
    | Refused
    | TokenHistory
    | Begin
    | Credit
    | ProgressRequest
    | Progress
    | Reroute
    | Failed
    | Close
    | Closed
    | Ping
    | Pong
)

_Map = dict[str, Value]
_M = TypeVar("_M", bound=ControlMessage)


@dataclass(frozen=True, slots=True)
class _Codec(Generic[_M]):
    """How one kind of control message travels: its `type`, and the two ways between message and map."""

    type_name: str
    message_type: type[_M]
    to_map: Callable[[_M], _Map]
    from_fields: Callable[[Fields], _M]


@dataclass(frozen=True, slots=True)
class StepHeader:
    """What precedes a step's tensor on the wire."""

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
        """Return the step, given `payload_bytes` bytes. Raises RemoteProtocolError for impossible token ids."""
        tensor = Tensor(self.dtype, self.shape, payload)
        _check_tokens(tensor)
        return Step(slices=self.slices, tensor=tensor)


def encode_control(message: ControlMessage, minor: int = LATEST_MINOR) -> bytes:
    """Return the body of a control frame, in version 1.`minor`.

    Raises LocalProtocolError when a value breaks a limit, or the version does not have it.
    """
    codec = _BY_TYPE[type(message)]
    if minor_of(message) > minor:
        raise LocalProtocolError(f"{codec.type_name}: version 1.{minor} of the job protocol cannot express this")
    try:
        fields: _Map = codec.to_map(message)
        _from_fields(codec, fields)
        return encode({"type": codec.type_name, **fields})
    except (RemoteProtocolError, ValueError) as error:
        raise LocalProtocolError(str(error)) from None


def decode_control(body: bytes | memoryview, minor: int = LATEST_MINOR) -> ControlMessage:
    """Return the message in the body of a control frame, in version 1.`minor`.

    Raises RemoteProtocolError for anything that is illegal, or unknown in this version.
    """
    value = decode(body, max_bytes=MAX_CONTROL_BYTES)
    type_name = value.get("type") if isinstance(value, dict) else None
    codec = _BY_NAME.get(type_name) if isinstance(type_name, str) else None
    if codec is None or not isinstance(value, dict):
        raise RemoteProtocolError("a control frame is no message of a known type")
    del value["type"]
    message: ControlMessage = _from_fields(codec, value)
    if minor_of(message) > minor:
        raise RemoteProtocolError(f"{codec.type_name}: unknown in version 1.{minor} of the job protocol")
    return message


def minor_of(message: ControlMessage) -> int:
    """Return the earliest version 1.x of the job protocol that has everything in a message."""
    if isinstance(message, TokenHistory | ProgressRequest | Progress):
        return 1
    if isinstance(message, Open) and message.sampling is not None and _sampling_extras(message.sampling):
        return 1
    return 0


def encode_step_header(step: Step) -> bytes:
    """Return the header of a step frame. Raises LocalProtocolError when a value breaks a limit."""
    try:
        fields: _Map = {
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


def load_to_map(load: Load) -> _Map:
    """Return how a stage's load travels."""
    return {
        "sessions": load.sessions,
        "queued_rows": load.queued_rows,
        "free_positions": load.free_positions,
        "step_s": float(load.step_s),
    }


def load_from(value: object, what: str) -> Load:
    """Return the load in a map from a peer. Raises RemoteProtocolError."""
    fields = Fields(value, what)
    load = Load(
        sessions=fields.integer("sessions", 0, MAX_INTEGER),
        queued_rows=fields.integer("queued_rows", 0, MAX_INTEGER),
        free_positions=fields.integer("free_positions", 0, MAX_INTEGER),
        step_s=fields.number("step_s", 0.0, MAX_SECONDS),
    )
    fields.finish()
    return load


def _from_fields(codec: _Codec[_M], value: object) -> _M:
    fields = Fields(value, codec.type_name)
    message = codec.from_fields(fields)
    fields.finish()
    return message


# Steps


def _slice_to_array(part: Slice) -> list[Value]:
    finish = None if part.finish_reason is None else part.finish_reason.value
    job, stage = part.session
    return [bytes.fromhex(job), stage, part.position, part.rows, part.draws, list(part.drafts), finish]


def _slice_from(value: object) -> Slice:
    job, stage, position, rows, draws, drafts, finish = tuple_of(value, 7, "slice")
    first = integer(position, 0, MAX_POSITIONS - 1, "slice position")
    count = integer(rows, 1, MAX_POSITIONS - first, "slice rows")
    guesses = tuple(
        integer(token, 0, MAX_VOCABULARY - 1, "slice draft") for token in array(drafts, MAX_DRAFTS, "slice drafts")
    )
    if guesses and draws != len(guesses) + 1:
        raise RemoteProtocolError("slice draws: expected one more than there are drafts")
    return Slice(
        session=SessionId(
            JobId(raw(job, JOB_ID_BYTES, "slice job").hex()), integer(stage, 0, MAX_STAGES, "slice stage")
        ),
        position=first,
        rows=count,
        draws=integer(draws, 0, count, "slice draws"),
        drafts=guesses,
        finish_reason=None if finish is None else choice(finish, FinishReason, "slice finish reason"),
    )


def _step_header_from(value: object) -> StepHeader:
    fields = Fields(value, "step")
    dtype = fields.choice("dtype", DType)
    shape = fields.array("shape", 2)
    slices = tuple(_slice_from(part) for part in fields.array("slices", MAX_SLICES))
    fields.finish()
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
    """Raise RemoteProtocolError if a tensor of token ids holds one outside of every vocabulary."""
    if tensor.dtype is DType.INT32:
        # Read as unsigned, a negative id is a large one.
        largest = max(memoryview(tensor.data).cast("B").cast("I"))
        if largest >= MAX_VOCABULARY:
            raise RemoteProtocolError(f"a token id is not from 0 to {MAX_VOCABULARY - 1}")


# Control messages, each with its way out and its way in


def _hello_to_map(message: Hello) -> _Map:
    return {"agent": message.agent, "window_bytes": message.window_bytes}


def _hello_from(fields: Fields) -> Hello:
    return Hello(
        agent=fields.name("agent", MAX_NAME_BYTES), window_bytes=fields.integer("window_bytes", 1, MAX_WINDOW_BYTES)
    )


def _open_to_map(message: Open) -> _Map:
    optional: Mapping[str, Value] = {
        "downstream": message.downstream,
        "feedback": message.feedback,
        "sampling": None if message.sampling is None else _sampling_to_map(message.sampling),
        "continues": None if message.continues is None else _session_to_array(message.continues),
    }
    return {
        "session": _session_to_array(message.session),
        "model": bytes.fromhex(message.model),
        "blocks": [message.blocks.start, message.blocks.end],
        "methods": list(message.methods),
        "positions": message.positions,
        "context": {key: value if isinstance(value, str) else float(value) for key, value in message.context.items()},
        "prefix": message.prefix,
        "upstream": list(message.upstream),
        "background": message.background,
        **{key: value for key, value in optional.items() if value is not None},
    }


def _open_from(fields: Fields) -> Open:
    message = Open(
        session=fields.session(),
        model=model_id(fields.take("model"), "open model"),
        blocks=block_range(fields.take("blocks"), "open blocks"),
        methods=tuple(name(method, MAX_NAME_BYTES, "method") for method in fields.array("methods", MAX_VOTES)),
        positions=fields.integer("positions", 1, MAX_POSITIONS),
        context=_context_from(fields.take("context")),
        prefix=_prefix_from(fields.take("prefix")),
        upstream=tuple(peer_id(peer, "open upstream") for peer in fields.array("upstream", MAX_STAGES)),
        downstream=_peer_if_any(fields, "downstream"),
        feedback=_peer_if_any(fields, "feedback"),
        sampling=_sampling_from(fields.take("sampling")) if "sampling" in fields else None,
        continues=fields.session("continues") if "continues" in fields else None,
        background=fields.flag("background"),
    )
    if not message.methods or len(set(message.methods)) != len(message.methods):
        raise RemoteProtocolError("open: expected at least one method, and none twice")
    if (message.sampling is None) == (message.downstream is None):
        raise RemoteProtocolError("open: a last stage has sampling and no downstream, any other stage the reverse")
    if message.continues is not None and message.continues.job == message.session.job:
        raise RemoteProtocolError("open: a session continues one of another attempt, which has another job id")
    return message


def _context_from(value: object) -> Mapping[str, str | float]:
    return {
        key: text(entry, MAX_NAME_BYTES, "context")
        if isinstance(entry, str)
        else number(entry, -MAX_NUMBER, MAX_NUMBER, "context")
        for key, entry in mapping(value, MAX_CONTEXT, MAX_NAME_BYTES, "context").items()
    }


def _prefix_from(value: object) -> bytes:
    if type(value) is not bytes or len(value) > MAX_PREFIX_BYTES or len(value) % PREFIX_HASH_BYTES:
        raise RemoteProtocolError(f"open prefix is not hashes of {PREFIX_HASH_BYTES} bytes each")
    return value


def _sampling_to_map(sampling: Sampling) -> _Map:
    return {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
        "stop_tokens": list(sampling.stop_tokens),
        **_sampling_extras(sampling),
    }


def _sampling_extras(sampling: Sampling) -> _Map:
    """Return the fields that version 1.0 does not have, where they change anything."""
    extras: _Map = {
        "top_k": sampling.top_k,
        "min_p": float(sampling.min_p),
        "repetition_penalty": float(sampling.repetition_penalty),
        "frequency_penalty": float(sampling.frequency_penalty),
        "presence_penalty": float(sampling.presence_penalty),
        "logit_bias": [[token, float(bias)] for token, bias in sampling.logit_bias],
        "min_length": sampling.min_length,
        "prompt_length": sampling.prompt_length,
    }
    return {key: value for key, value in extras.items() if value != _NEUTRAL_SAMPLING[key]}


def _sampling_from(value: object) -> Sampling:
    fields = Fields(value, "sampling")
    stop_tokens = fields.array("stop_tokens", MAX_STOP_TOKENS)
    given = {key for key in _NEUTRAL_SAMPLING if key in fields}

    def number_if_any(key: str, low: float, high: float, neutral: float) -> float:
        return fields.number(key, low, high) if key in given else neutral

    def integer_if_any(key: str, high: int) -> int:
        return fields.integer(key, 1, high) if key in given else 0

    sampling = Sampling(
        temperature=fields.number("temperature", 0.0, MAX_TEMPERATURE),
        top_p=fields.number("top_p", 0.0, 1.0),
        seed=fields.integer("seed", 0, MAX_UINT64),
        max_tokens=fields.integer("max_tokens", 1, MAX_POSITIONS),
        stop_tokens=tuple(integer(token, 0, MAX_VOCABULARY - 1, "stop token") for token in stop_tokens),
        top_k=integer_if_any("top_k", MAX_VOCABULARY),
        min_p=number_if_any("min_p", 0.0, 1.0, 0.0),
        repetition_penalty=number_if_any("repetition_penalty", 1 / MAX_PENALTY, MAX_PENALTY, 1.0),
        frequency_penalty=number_if_any("frequency_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0),
        presence_penalty=number_if_any("presence_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0),
        logit_bias=_logit_bias_from(fields.array("logit_bias", MAX_LOGIT_BIASES)) if "logit_bias" in given else (),
        min_length=integer_if_any("min_length", MAX_POSITIONS),
        prompt_length=integer_if_any("prompt_length", MAX_POSITIONS),
    )
    fields.finish()
    if sampling.top_p == 0.0:
        raise RemoteProtocolError("sampling top_p is 0: nothing could be drawn")
    if given != _sampling_extras(sampling).keys():  # so that one job has one form, and version 1.0 sees none of them
        raise RemoteProtocolError("sampling: an optional field has the value that it has when it is absent")
    return sampling


def _logit_bias_from(value: Sequence[object]) -> tuple[tuple[int, float], ...]:
    pairs = tuple(
        (
            integer(token, 0, MAX_VOCABULARY - 1, "logit bias token"),
            number(bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, "logit bias"),
        )
        for token, bias in (tuple_of(pair, 2, "logit bias") for pair in value)
    )
    if any(first[0] >= second[0] for first, second in pairwise(pairs)):
        raise RemoteProtocolError("logit bias: token ids are not ascending")
    return pairs


def _token_history_to_map(message: TokenHistory) -> _Map:
    try:
        tokens = struct.pack(f"<{len(message.tokens)}I", *message.tokens)
    except struct.error:
        raise LocalProtocolError("token history: a token id is no unsigned 32-bit integer") from None
    return {"session": _session_to_array(message.session), "tokens": tokens}


def _token_history_from(fields: Fields) -> TokenHistory:
    raw_tokens = fields.take("tokens")
    if type(raw_tokens) is not bytes or not raw_tokens or len(raw_tokens) % 4:
        raise RemoteProtocolError("token history: expected token ids of 4 bytes each")
    if len(raw_tokens) > 4 * MAX_HISTORY_TOKENS:
        raise RemoteProtocolError(f"token history: more than {MAX_HISTORY_TOKENS} tokens")
    tokens = struct.unpack(f"<{len(raw_tokens) // 4}I", raw_tokens)
    if max(tokens) >= MAX_VOCABULARY:
        raise RemoteProtocolError(f"a token id is not from 0 to {MAX_VOCABULARY - 1}")
    return TokenHistory(session=fields.session(), tokens=tokens)


def _opened_to_map(message: Opened) -> _Map:
    return {
        "session": _session_to_array(message.session),
        "load": load_to_map(message.load),
        "votes": {method: float(score) for method, score in message.votes.items()},
        "cached": dict(message.cached),
        "policy": dict(message.policy),
        "held": message.held,
        "kept_from": message.replay_from,
        **({} if message.statement is None else {"statement": message.statement}),
    }


def _opened_from(fields: Fields) -> Opened:
    votes = mapping(fields.take("votes"), MAX_VOTES, MAX_NAME_BYTES, "opened votes")
    cached = mapping(fields.take("cached"), MAX_VOTES, MAX_NAME_BYTES, "opened cached")
    policy = mapping(fields.take("policy"), MAX_SWITCHES, MAX_SWITCH_BYTES, "opened policy")
    held = fields.integer("held", 0, MAX_POSITIONS)
    if not votes:
        raise RemoteProtocolError("opened: no method is offered")
    return Opened(
        session=fields.session(),
        load=load_from(fields.take("load"), "load"),
        votes={method: number(score, -MAX_SCORE, MAX_SCORE, "score") for method, score in votes.items()},
        cached={variant: integer(count, 0, MAX_POSITIONS, "cached") for variant, count in cached.items()},
        policy={switch: name(value, MAX_SWITCH_BYTES, "policy") for switch, value in policy.items()},
        held=held,
        replay_from=fields.integer("kept_from", 0, held),
        statement=_statement_if_any(fields),
    )


def _begin_to_map(message: Begin) -> _Map:
    return {
        "session": _session_to_array(message.session),
        "method": message.method,
        "ballots": [
            [ballot.peer, [None if score is None else float(score) for score in ballot.scores]]
            for ballot in message.ballots
        ],
        "start": message.start,
        "onward": message.forward_from,
        **({} if message.statement is None else {"statement": message.statement}),
    }


def _begin_from(fields: Fields) -> Begin:
    return Begin(
        session=fields.session(),
        method=fields.name("method", MAX_NAME_BYTES),
        ballots=tuple(_ballot_from(value) for value in fields.array("ballots", MAX_BALLOTS)),
        start=fields.integer("start", 0, MAX_POSITIONS - 1),
        forward_from=fields.integer("onward", 0, MAX_POSITIONS - 1),
        statement=_statement_if_any(fields),
    )


def _statement_if_any(fields: Fields) -> bytes | None:
    return fields.raw("statement", SHA256_BYTES) if "statement" in fields else None


def _ballot_from(value: object) -> Ballot:
    peer, scores = tuple_of(value, 2, "ballot")
    return Ballot(
        peer_id(peer, "ballot peer"),
        tuple(
            None if score is None else number(score, -MAX_SCORE, MAX_SCORE, "score")
            for score in array(scores, MAX_VOTES, "ballot scores")
        ),
    )


def _refused_to_map(message: Refused) -> _Map:
    return {
        "session": _session_to_array(message.session),
        "reason": message.reason.value,
        "message": _presentable(message.message),
        "load": load_to_map(message.load),
    }


def _refused_from(fields: Fields) -> Refused:
    return Refused(
        session=fields.session(),
        reason=fields.choice("reason", RefusalReason),
        message=fields.text("message", MAX_TEXT_BYTES),
        load=load_from(fields.take("load"), "load"),
    )


def _credit_to_map(message: Credit) -> _Map:
    return {"session": _session_to_array(message.session), "consumed_bytes": message.consumed_bytes}


def _credit_from(fields: Fields) -> Credit:
    return Credit(session=fields.session(), consumed_bytes=fields.integer("consumed_bytes", 1, MAX_WINDOW_BYTES))


def _complaint_to_map(message: Reroute | Failed) -> _Map:
    return {
        "session": _session_to_array(message.session),
        "reason": message.reason.value,
        "message": _presentable(message.message),
        **({} if message.peer is None else {"peer": message.peer}),
    }


def _reroute_from(fields: Fields) -> Reroute:
    message = Reroute(
        session=fields.session(),
        reason=fields.choice("reason", FailureReason),
        message=fields.text("message", MAX_TEXT_BYTES),
        peer=_peer_if_any(fields, "peer"),
    )
    if message.reason not in {FailureReason.DOWNSTREAM, FailureReason.LEAVING}:
        raise RemoteProtocolError(f"reroute: {message.reason} is no reason to hold a session and ask for another route")
    return message


def _progress_request_to_map(message: ProgressRequest) -> _Map:
    return {"session": _session_to_array(message.session)}


def _progress_request_from(fields: Fields) -> ProgressRequest:
    return ProgressRequest(session=fields.session())


def _progress_to_map(message: Progress) -> _Map:
    return {
        "session": _session_to_array(message.session),
        "received": message.received,
        "computed": message.computed,
        "sent": message.sent,
    }


def _progress_from(fields: Fields) -> Progress:
    return Progress(
        session=fields.session(),
        received=fields.integer("received", 0, MAX_POSITIONS),
        computed=fields.integer("computed", 0, MAX_POSITIONS),
        sent=fields.integer("sent", 0, MAX_POSITIONS),
    )


def _failed_from(fields: Fields) -> Failed:
    return Failed(
        session=fields.session(),
        reason=fields.choice("reason", FailureReason),
        message=fields.text("message", MAX_TEXT_BYTES),
        peer=_peer_if_any(fields, "peer"),
    )


def _close_to_map(message: Close) -> _Map:
    return {"session": _session_to_array(message.session)}


def _close_from(fields: Fields) -> Close:
    return Close(session=fields.session())


def _closed_to_map(message: Closed) -> _Map:
    statistics = message.statistics
    value: _Map = {
        "session": _session_to_array(message.session),
        "statistics": {
            "steps": statistics.steps,
            "rows": statistics.rows,
            "compute_s": float(statistics.compute_s),
            "queue_s": float(statistics.queue_s),
            "bytes_in": statistics.bytes_in,
            "bytes_out": statistics.bytes_out,
        },
        "hardware": message.hardware,
    }
    if message.countersignature is not None:
        value["countersignature"] = message.countersignature
    return value


def _closed_from(fields: Fields) -> Closed:
    inner = Fields(fields.take("statistics"), "statistics")
    statistics = SessionStatistics(
        steps=inner.integer("steps", 0, MAX_INTEGER),
        rows=inner.integer("rows", 0, MAX_INTEGER),
        compute_s=inner.number("compute_s", 0.0, MAX_SECONDS),
        queue_s=inner.number("queue_s", 0.0, MAX_SECONDS),
        bytes_in=inner.integer("bytes_in", 0, MAX_INTEGER),
        bytes_out=inner.integer("bytes_out", 0, MAX_INTEGER),
    )
    inner.finish()
    return Closed(
        session=fields.session(),
        statistics=statistics,
        hardware=fields.name("hardware", MAX_HARDWARE_BYTES),
        countersignature=(fields.raw("countersignature", SIGNATURE_BYTES) if "countersignature" in fields else None),
    )


def _ping_to_map(message: Ping) -> _Map:
    return {"nonce": message.nonce}


def _ping_from(fields: Fields) -> Ping:
    return Ping(nonce=fields.integer("nonce", 0, MAX_UINT64))


def _pong_to_map(message: Pong) -> _Map:
    return {"nonce": message.nonce}


def _pong_from(fields: Fields) -> Pong:
    return Pong(nonce=fields.integer("nonce", 0, MAX_UINT64))


def _session_to_array(session: SessionId) -> list[Value]:
    return [bytes.fromhex(session.job), session.stage]


def _peer_if_any(fields: Fields, key: str) -> PeerId | None:
    return peer_id(fields.take(key), f"{fields.what} {key}") if key in fields else None


def _presentable(message: str) -> str:
    """Return a message for people as it may travel: a failure must not fail to be told for want of a shorter text."""
    printable = CONTROL_CHARACTERS.sub(" ", message)
    return printable.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


_CODECS: Final[tuple[_Codec[Any], ...]] = (
    _Codec("hello", Hello, _hello_to_map, _hello_from),
    _Codec("open", Open, _open_to_map, _open_from),
    _Codec("opened", Opened, _opened_to_map, _opened_from),
    _Codec("refused", Refused, _refused_to_map, _refused_from),
    _Codec("token_history", TokenHistory, _token_history_to_map, _token_history_from),
    _Codec("begin", Begin, _begin_to_map, _begin_from),
    _Codec("credit", Credit, _credit_to_map, _credit_from),
    _Codec("progress_request", ProgressRequest, _progress_request_to_map, _progress_request_from),
    _Codec("progress", Progress, _progress_to_map, _progress_from),
    _Codec("reroute", Reroute, _complaint_to_map, _reroute_from),
    _Codec("failed", Failed, _complaint_to_map, _failed_from),
    _Codec("close", Close, _close_to_map, _close_from),
    _Codec("closed", Closed, _closed_to_map, _closed_from),
    _Codec("ping", Ping, _ping_to_map, _ping_from),
    _Codec("pong", Pong, _pong_to_map, _pong_from),
)
_NEUTRAL_SAMPLING: Final[Mapping[str, Value]] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": [],
    "min_length": 0,
    "prompt_length": 0,
}
"""The fields of a sampling that version 1.0 does not have, and the values at which they change nothing."""

_BY_TYPE: Final = {codec.message_type: codec for codec in _CODECS}
_BY_NAME: Final = {codec.type_name: codec for codec in _CODECS}
