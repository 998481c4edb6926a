"""Material for tests of the job stream: messages of every type, and raw frames as a remote would send them."""

from protocol.codec import encode_control, encode_step_header
from protocol.connection import JobConnection
from protocol.framing import FrameType, encode_frame, encode_step
from protocol.identity import BlockRange, JobId, ModelId, SessionId, peer_id_from_public_key
from protocol.limits import MAX_POSITIONS, MAX_UINT64, MAX_WINDOW_BYTES
from protocol.messages import (
    Ballot,
    Begin,
    Close,
    Closed,
    ControlMessage,
    Credit,
    Failed,
    FailureReason,
    Hello,
    Load,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    RefusalReason,
    Refused,
    Reroute,
    Sampling,
    SessionStatistics,
    Slice,
    Step,
    TokenHistory,
)
from protocol.reports import Progress, ProgressRequest, StepTiming, Timings, TimingsRequest
from protocol.states import Role
from protocol.tensors import DType, Tensor

WINDOW = 64
ROW_BYTES = 8


def session_id(number: int) -> SessionId:
    return SessionId(JobId(f"{number:032x}"), 1)


SESSION = session_id(0)


def open_message(session: SessionId = SESSION) -> Open:
    return Open(
        session=session,
        model=ModelId("0f" * 32),
        blocks=BlockRange(0, 30),
        methods=("arithmetic=fp32",),
        positions=100,
        sampling=Sampling(max_tokens=10),
    )


def step_message(*rows_of: tuple[SessionId, int]) -> Step:
    slices = tuple(Slice(session=session, position=0, rows=rows, draws=0) for session, rows in rows_of)
    rows = sum(part.rows for part in slices)
    return Step(slices=slices, tensor=Tensor(DType.FLOAT32, (rows, 2), bytes(range(ROW_BYTES)) * rows))


def rows(count: int, session: SessionId = SESSION) -> Step:
    return step_message((session, count))


def credit(count: int, session: SessionId = SESSION) -> Credit:
    return Credit(session=session, consumed_bytes=count * ROW_BYTES)


def failed(session: SessionId = SESSION) -> Failed:
    return Failed(session=session, reason=FailureReason.ENGINE, message="gone")


def reroute(session: SessionId = SESSION) -> Reroute:
    return Reroute(session=session, reason=FailureReason.DOWNSTREAM, message="cut off")


def refused(session: SessionId = SESSION) -> Refused:
    return Refused(session=session, reason=RefusalReason.FULL, message="full", load=Load())


def opened(session: SessionId = SESSION) -> Opened:
    return Opened(session=session, load=Load(), votes={"arithmetic=fp32": 0.0})


def begin(session: SessionId = SESSION) -> Begin:
    return Begin(session=session, method="arithmetic=fp32", ballots=(Ballot(PEER, (0.0,)),))


def token_history(session: SessionId = SESSION) -> TokenHistory:
    return TokenHistory(session=session, tokens=(1, 2, 3))


def progress_request(session: SessionId = SESSION) -> ProgressRequest:
    return ProgressRequest(session=session)


def progress(session: SessionId = SESSION) -> Progress:
    return Progress(session=session, received=3, computed=2, sent=1)


def close(session: SessionId = SESSION) -> Close:
    return Close(session=session)


def closed(session: SessionId = SESSION) -> Closed:
    return Closed(session=session, statistics=SessionStatistics())


def hello(window_bytes: int = WINDOW) -> Hello:
    return Hello(agent="test", window_bytes=window_bytes)


PEER = peer_id_from_public_key(bytes(range(32)))
LOAD = Load(sessions=3, queued_rows=70000, free_positions=1 << 40, step_s=0.025)

EVERY_MESSAGE: tuple[Message, ...] = (
    hello(),
    open_message(),
    opened(),
    refused(),
    token_history(),
    begin(),
    rows(1),
    credit(1),
    progress_request(),
    progress(),
    reroute(),
    failed(),
    close(),
    closed(),
    Ping(nonce=1),
    Pong(nonce=1),
)

# Every control message by the name of its type, with its optional fields where they may stand together.
MESSAGES: dict[str, ControlMessage] = {
    "hello": Hello(agent="metaswarm/0.1.0", window_bytes=MAX_WINDOW_BYTES),
    "open": Open(
        session=SESSION,
        model=ModelId("0f" * 32),
        blocks=BlockRange(10, 20),
        methods=("arithmetic=bf16|engine=fused", "arithmetic=fp32|engine=fused"),
        positions=MAX_POSITIONS,
        context={"prompt_tokens": 5.0, "objective": "latency"},
        prefix=bytes(range(32)),
        upstream=(PEER,),
        feedback=PEER,
        sampling=Sampling(
            temperature=0.7,
            top_p=0.9,
            seed=MAX_UINT64,
            max_tokens=5,
            stop_tokens=(0, 49151),
            top_k=40,
            min_p=0.05,
            repetition_penalty=1.1,
            frequency_penalty=-0.5,
            presence_penalty=2.0,
            logit_bias=((7, -100.0), (9, 1.5)),
            min_length=12,
            prompt_length=10,
            logprobs=6,
            json_schema='{"type": "object"}',
        ),
        continues=SessionId(JobId("ff" * 16), 2),
        background=True,
    ),
    "opened": Opened(
        session=SESSION,
        load=LOAD,
        votes={"arithmetic=fp32": -1.25, "arithmetic=bf16": -2.0},
        cached={"fused/fp32": 64},
        policy={"batching": "continuous"},
        held=70,
        kept_from=64,
        statement=bytes(range(32)),
    ),
    "begin": Begin(
        session=SESSION,
        method="arithmetic=bf16",
        ballots=(Ballot(PEER, (-1.25, None)),),
        start=64,
        onward=32,
        statement=bytes(range(32)),
    ),
    "token_history": TokenHistory(session=SESSION, tokens=(0, 49151)),
    "refused": Refused(session=SESSION, reason=RefusalReason.FULL, message="no room", load=LOAD),
    "credit": Credit(session=SESSION, consumed_bytes=1),
    "progress_request": ProgressRequest(session=SESSION),
    "progress": Progress(session=SESSION, received=MAX_POSITIONS, computed=3, sent=0),
    "timings_request": TimingsRequest(session=SESSION),
    "timings": Timings(
        session=SESSION, clock_s=1234.5, steps=(StepTiming(64, 32, 1234.0, 0.0, 0.25, 0.125),), dropped=1
    ),
    "reroute": Reroute(session=SESSION, reason=FailureReason.DOWNSTREAM, message="cut off", peer=PEER),
    "failed": Failed(session=SESSION, reason=FailureReason.DOWNSTREAM, message="gone", peer=PEER),
    "close": Close(session=SESSION),
    "closed": Closed(
        session=SESSION,
        statistics=SessionStatistics(steps=1, rows=2, compute_s=0.5, queue_s=0.0, bytes_in=3, bytes_out=1 << 50),
        hardware="cpu",
        countersignature=bytes(range(64)),
    ),
    "ping": Ping(nonce=MAX_UINT64),
    "pong": Pong(nonce=0),
}


def wire(*messages: Message) -> bytes:
    """Return messages as they travel, whether or not anybody may say them."""
    pieces: list[bytes] = []
    for message in messages:
        if isinstance(message, Step):
            pieces += encode_step(encode_step_header(message), message.tensor.data)
        else:
            pieces.append(encode_frame(FrameType.CONTROL, encode_control(message)))
    return b"".join(pieces)


def new_connection(role: Role, window_bytes: int = WINDOW) -> JobConnection:
    return JobConnection(role, agent="test", window_bytes=window_bytes)


def greeted(role: Role, window_bytes: int = WINDOW) -> JobConnection:
    """Return a connection on which both sides have said hello."""
    connection = new_connection(role)
    connection.send_hello()
    connection.receive_data(wire(hello(window_bytes)))
    return connection


def greeted_pair(window_bytes: int = WINDOW) -> tuple[JobConnection, JobConnection]:
    """Return initiator and responder after both hellos."""
    initiator, responder = new_connection(Role.INITIATOR), new_connection(Role.RESPONDER, window_bytes)
    responder.receive_data(b"".join(initiator.send_hello()))
    initiator.receive_data(b"".join(responder.send_hello()))
    return initiator, responder
