"""Two ends of a job stream, driven in every order, over a wire that cuts and delays as it likes."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.connection import JobConnection
from protocol.errors import LocalProtocolError
from protocol.framing import FrameReader, FrameType, encode_frame, split_step
from protocol.identity import SessionId
from protocol.messages import Close, Closed, Credit, Failed, Hello, Message, Open, Refused, Step
from protocol.states import ConnectionState, Role, SessionState
from tests.unit.protocol.job_streams import (
    ROW_BYTES,
    begin,
    close,
    closed,
    failed,
    new_connection,
    open_message,
    opened,
    progress,
    progress_request,
    refused,
    reroute,
    session_id,
    step_message,
    token_history,
)

MAX_ROWS = 6
SLOTS = 3
WINDOW_STATES = {SessionState.BEGUN, SessionState.FORWARDED}

slots = st.integers(0, SLOTS - 1)


class JobStream(RuleBasedStateMachine):
    """Both connections, the bytes between them, and what each application may know.

    Three sessions are alive at a time, each in a slot. As in the protocol, an id is opened once, and not after rows of
    it were sent; where a session is over, a fresh id takes its slot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[Role, JobConnection] = {}
        self.flight: dict[Role, bytearray] = {role: bytearray() for role in Role}  # by sender
        self.chunks: list[bytes] = []  # of the initiator's last step, not yet written
        self.said: dict[Role, list[Message]] = {role: [] for role in Role}
        self.heard: dict[Role, list[Message]] = {role: [] for role in Role}
        self.window = 0
        self.sessions = [session_id(number) for number in range(SLOTS)]
        self.slots = list(self.sessions)
        self.used: set[SessionId] = set()  # opened, or rows of it sent
        self.over: set[SessionId] = set()  # no more rows of it will be sent
        self.gone: set[SessionId] = set()  # the responder has failed or forgotten it: its rows are nobody's
        self.held: Counter[SessionId] = Counter()  # what the responder has received and not credited

    @property
    def initiator(self) -> JobConnection:
        return self.ends[Role.INITIATOR]

    @property
    def responder(self) -> JobConnection:
        return self.ends[Role.RESPONDER]

    @initialize(window_rows=st.integers(1, 2 * MAX_ROWS), first=st.sampled_from(Role), patient=st.booleans())
    def greet(self, window_rows: int, first: Role, patient: bool) -> None:
        self.window = window_rows * ROW_BYTES
        self.ends = {role: new_connection(role, self.window) for role in Role}
        for role in sorted(Role, key=lambda role: role is not first):
            self.flight[role] += b"".join(self.ends[role].send_hello())
        if patient:
            self.deliver_everything()

    def say(self, role: Role, message: Message) -> None:
        pieces = self.ends[role].send(message)
        if pieces:
            self.said[role].append(message)
        self.flight[role] += b"".join(pieces)

    # The initiator's application

    @rule(slot=slots)
    def ask_for_a_session(self, slot: int) -> None:
        if self.slots[slot] in self.used:
            return
        self.used.add(self.slots[slot])
        self.say(Role.INITIATOR, open_message(self.slots[slot]))

    @rule(slot=slots)
    def open_a_session_undisturbed(self, slot: int) -> None:
        """The common case in one rule: chance alone seldom gets so far."""
        session = self.slots[slot]
        if session not in self.used:
            self.ask_for_a_session(slot)
            self.deliver_everything()
            if self.responder.session_state(session) is SessionState.OPENING:
                self.say(Role.RESPONDER, opened(session))
            self.deliver_everything()
            self.begin_a_session(slot)

    @rule(slot=slots)
    def begin_a_session(self, slot: int) -> None:
        if self.initiator.session_state(self.slots[slot]) is SessionState.OPEN:
            self.say(Role.INITIATOR, begin(self.slots[slot]))

    @rule(slot=slots)
    def tell_the_tokens_so_far(self, slot: int) -> None:
        if self.initiator.session_state(self.slots[slot]) is SessionState.OPEN:
            self.say(Role.INITIATOR, token_history(self.slots[slot]))

    @rule(slot=slots)
    def ask_for_progress(self, slot: int) -> None:
        if self.initiator.session_state(self.slots[slot]) is SessionState.BEGUN:
            self.say(Role.INITIATOR, progress_request(self.slots[slot]))

    @rule(slot=slots)
    def end_a_session(self, slot: int) -> None:
        session = self.slots[slot]
        if self.initiator.session_state(session) in {
            SessionState.OPENING,
            SessionState.OPEN,
            SessionState.BEGUN,
            SessionState.FAILED,
        }:
            self.say(Role.INITIATOR, close(session))

    @precondition(lambda self: any(self.rows_allowed(slot) for slot in range(SLOTS)))
    @rule(wanted=st.dictionaries(slots, st.integers(1, MAX_ROWS), min_size=1), data=st.data())
    def send_rows(self, wanted: dict[int, int], data: st.DataObject) -> None:
        rows = [
            (self.slots[slot], min(count, allowed))
            for slot, count in wanted.items()
            if (allowed := self.rows_allowed(slot))
        ]
        if not rows:
            return
        self.used.update(session for session, _ in rows)
        self.write_chunks(len(self.chunks))
        message = step_message(*rows)
        [piece] = self.initiator.send(message)
        self.said[Role.INITIATOR].append(message)
        first, *self.chunks = cut_step(piece, data)
        self.flight[Role.INITIATOR] += first

    def rows_allowed(self, slot: int) -> int:
        session = self.slots[slot]
        return 0 if session in self.over else self.initiator.sendable_bytes(session) // ROW_BYTES

    @precondition(lambda self: self.chunks)
    @rule(count=st.integers(1, 4))
    def write_chunks(self, count: int) -> None:
        self.flight[Role.INITIATOR] += b"".join(self.chunks[:count])
        del self.chunks[:count]

    @rule(slot=slots, new_session=st.booleans())
    def leave_a_session_behind(self, slot: int, new_session: bool) -> None:
        session = self.slots[slot]
        if self.initiator.session_state(session) is SessionState.FORWARDED:
            self.initiator.forget(session)
            self.over.add(session)
        if new_session and session in self.used and self.initiator.session_state(session) is SessionState.IDLE:
            self.over.add(session)
            self.slots[slot] = session_id(len(self.sessions))
            self.sessions.append(self.slots[slot])

    # The responder's application

    def borrowed(self, data: st.DataObject, condition: Callable[[SessionState], bool] = bool) -> SessionId | None:
        """Return a session in a state that allows for something, if the responder may speak and there is one."""
        found = [one for one in self.sessions[-6:] if condition(self.responder.session_state(one))]
        is_open = self.responder.state is ConnectionState.OPEN
        return data.draw(st.sampled_from(found)) if found and is_open else None

    @rule(data=st.data(), admit=st.booleans())
    def answer_an_open(self, data: st.DataObject, admit: bool) -> None:
        if session := self.borrowed(data, lambda state: state in {SessionState.OPENING, SessionState.CLOSING}):
            self.say(Role.RESPONDER, opened(session) if admit else refused(session))

    @rule(data=st.data(), share=st.floats(0, 1))
    def consume_rows(self, data: st.DataObject, share: float) -> None:
        if session := self.borrowed(data, lambda state: state in WINDOW_STATES):
            rows = round(self.held[session] // ROW_BYTES * share)
            if rows:
                self.held[session] -= rows * ROW_BYTES
                self.say(Role.RESPONDER, Credit(session=session, consumed_bytes=rows * ROW_BYTES))

    @rule(data=st.data())
    def fail_a_session(self, data: st.DataObject) -> None:
        if session := self.borrowed(
            data, lambda state: state in {*WINDOW_STATES, SessionState.OPEN, SessionState.CLOSING}
        ):
            self.held[session] = 0
            self.gone.add(session)
            self.say(Role.RESPONDER, failed(session))

    @rule(data=st.data())
    def ask_for_another_route(self, data: st.DataObject) -> None:
        if session := self.borrowed(data, lambda state: state in {SessionState.BEGUN, SessionState.CLOSING}):
            self.say(Role.RESPONDER, reroute(session))

    @rule(data=st.data())
    def report_progress(self, data: st.DataObject) -> None:
        if session := self.borrowed(data, lambda state: state in {SessionState.BEGUN, SessionState.CLOSING}):
            self.say(Role.RESPONDER, progress(session))

    @rule(data=st.data())
    def answer_too_late(self, data: st.DataObject) -> None:
        if session := self.borrowed(data, lambda state: state in {SessionState.IDLE, SessionState.FAILED}):
            assert self.responder.send(Credit(session=session, consumed_bytes=1)) == []
            assert self.responder.send(failed(session)) == []
            assert self.responder.send(reroute(session)) == []
            assert self.responder.send(progress(session)) == []

    @rule(data=st.data())
    def confirm_a_close(self, data: st.DataObject) -> None:
        if session := self.borrowed(data, lambda state: state is SessionState.CLOSING):
            self.say(Role.RESPONDER, closed(session))

    @rule(data=st.data())
    def forget_a_session(self, data: st.DataObject) -> None:
        if session := self.borrowed(data, lambda state: state is SessionState.FORWARDED):
            self.responder.forget(session)
            self.held[session] = 0
            self.gone.add(session)

    # Both

    @rule(slot=slots)
    def try_too_much(self, slot: int) -> None:
        session = self.slots[slot]
        sendable = self.initiator.sendable_bytes(session)
        with pytest.raises(LocalProtocolError):
            self.initiator.send(step_message((session, sendable // ROW_BYTES + 1)))
        assert self.initiator.sendable_bytes(session) == sendable
        if self.responder.session_state(session) in WINDOW_STATES:
            with pytest.raises(LocalProtocolError):
                self.responder.send(Credit(session=session, consumed_bytes=self.window + 1))

    # The wire

    @rule(sender=st.sampled_from(Role), size=st.integers(1, 200))
    def deliver(self, sender: Role, size: int) -> None:
        receiver = Role.RESPONDER if sender is Role.INITIATOR else Role.INITIATOR
        data = bytes(self.flight[sender][:size])
        del self.flight[sender][:size]
        if data:
            for message in self.ends[receiver].receive_data(data):
                self.take(receiver, message)

    @rule(sender=st.sampled_from(Role))
    def deliver_all_from(self, sender: Role) -> None:
        self.deliver(sender, 1 << 20)

    def deliver_everything(self) -> None:
        self.write_chunks(len(self.chunks))
        for role in Role:
            self.deliver(role, 1 << 20)

    def take(self, receiver: Role, message: Message) -> None:
        if isinstance(message, Hello):
            return
        self.heard[receiver].append(message)
        match message:
            case Close():
                self.held[message.session] = 0
            case Failed() if self.initiator.session_state(message.session) is SessionState.IDLE:
                self.over.add(message.session)
            case Step():
                for part in message.slices:
                    state = self.responder.session_state(part.session)
                    if state in WINDOW_STATES and part.session not in self.gone:
                        self.held[part.session] += part.rows * ROW_BYTES
            case _:
                pass

    # What always holds

    @invariant()
    def nothing_is_in_error(self) -> None:
        assert all(end.state is not ConnectionState.ERROR for end in self.ends.values())

    @invariant()
    def no_window_is_exceeded(self) -> None:
        assert all(0 <= held <= self.window for held in self.held.values())

    @invariant()
    def the_initiator_knows_of_all_that_the_responder_holds(self) -> None:
        for session in self.slots:
            if self.ends and all(end.session_state(session) is SessionState.BEGUN for end in self.ends.values()):
                assert self.initiator.sendable_bytes(session) <= self.window - self.held[session]

    def teardown(self) -> None:
        """Let everybody finish: all that was said was heard, every Open has its end, and nothing is remembered."""
        if not self.ends:
            return
        for _ in range(3):
            self.settle()
            for session in self.sessions:
                if self.initiator.session_state(session) in {
                    SessionState.OPEN,
                    SessionState.BEGUN,
                    SessionState.FAILED,
                }:
                    self.say(Role.INITIATOR, close(session))
                if self.initiator.session_state(session) is SessionState.FORWARDED:
                    self.initiator.forget(session)
        self.settle()
        assert self.initiator.session_count == self.responder.session_count == 0
        self.assert_all_was_heard()
        self.assert_every_open_has_one_end()
        for end in self.ends.values():
            assert end.receive_data(b"") == []
            assert end.state is ConnectionState.CLOSED

    def settle(self) -> None:
        """Deliver everything, and have the responder answer whatever waits for an answer."""
        self.deliver_everything()
        for session in self.sessions:
            match self.responder.session_state(session):
                case SessionState.OPENING:
                    self.say(Role.RESPONDER, opened(session))
                case SessionState.CLOSING:
                    self.say(Role.RESPONDER, closed(session))
                case SessionState.FORWARDED:
                    self.say(Role.RESPONDER, failed(session))
                case _:
                    pass
        self.deliver_everything()

    def assert_all_was_heard(self) -> None:
        """Steps in their order, control messages in theirs; only what crossed something else was passed over."""
        steps = [message for message in self.said[Role.INITIATOR] if isinstance(message, Step)]
        assert [message for message in self.heard[Role.RESPONDER] if isinstance(message, Step)] == steps
        for sender, receiver in ((Role.INITIATOR, Role.RESPONDER), (Role.RESPONDER, Role.INITIATOR)):
            said = [message for message in self.said[sender] if not isinstance(message, Step)]
            heard = [message for message in self.heard[receiver] if not isinstance(message, Step)]
            missed = list(said)
            for message in heard:
                missed.remove(message)
            assert not any(isinstance(message, (Open, Refused, Closed)) for message in missed)
            remaining = iter(said)
            assert all(message in remaining for message in heard)

    def assert_every_open_has_one_end(self) -> None:
        opens = [message.session for message in self.said[Role.INITIATOR] if isinstance(message, Open)]
        for session in opens:
            ends = [
                message
                for message in self.heard[Role.INITIATOR]
                if isinstance(message, (Refused, Closed, Failed)) and message.session == session
            ]
            # Rows that were sent after the end are a new matter: they may be complained about as well.
            definite = [message for message in ends if not isinstance(message, Failed)]
            assert len(definite) <= 1 <= len(ends)


def cut_step(piece: bytes, data: st.DataObject) -> list[bytes]:
    """Return a step that came in one frame as a STEP frame and CHUNK frames, cut anywhere."""
    [frame] = FrameReader().receive_data(piece)
    header, payload = split_step(frame.body)
    first = data.draw(st.integers(0, len(payload)))
    places = data.draw(st.lists(st.integers(first, len(payload)), max_size=4).map(sorted))
    parts = [payload[a:b] for a, b in zip([first, *places], [*places, len(payload)], strict=True) if a < b]
    return [
        encode_frame(FrameType.STEP, len(header).to_bytes(4, "big"), header, payload[:first]),
        *(encode_frame(FrameType.CHUNK, part) for part in parts),
    ]


JobStream.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestJobStream = JobStream.TestCase
