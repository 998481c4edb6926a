"""Material for tests of the job stream: messages of every type, and raw frames as a remote would send them."""

from protocol.codec import encode_control, encode_step_header
from protocol.connection import JobConnection
from protocol.framing import FrameType, encode_frame, encode_step
from protocol.identity import BlockRange, JobId, ModelId, SessionId
from protocol.messages import (
    Close,
    Closed,
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
    Sampling,
    SessionStatistics,
    Slice,
    Step,
)
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
        method="arithmetic=fp32",
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


def refused(session: SessionId = SESSION) -> Refused:
    return Refused(session=session, reason=RefusalReason.FULL, message="full", load=Load())


def opened(session: SessionId = SESSION) -> Opened:
    return Opened(session=session, load=Load())


def close(session: SessionId = SESSION) -> Close:
    return Close(session=session)


def closed(session: SessionId = SESSION) -> Closed:
    return Closed(session=session, statistics=SessionStatistics())


def hello(window_bytes: int = WINDOW) -> Hello:
    return Hello(agent="test", window_bytes=window_bytes)


EVERY_MESSAGE: tuple[Message, ...] = (
    hello(),
    open_message(),
    opened(),
    refused(),
    rows(1),
    credit(1),
    failed(),
    close(),
    closed(),
    Ping(nonce=1),
    Pong(nonce=1),
)


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
