"""Hypothesis strategies for everything that travels between peers."""

from dataclasses import replace

from hypothesis import strategies as st

from protocol.canonical import Value
from protocol.identity import BlockRange, JobId, ModelId, PeerId, SessionId, peer_id_from_public_key
from protocol.limits import (
    MAX_INTEGER,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_NAME_BYTES,
    MAX_PENALTY,
    MAX_POSITIONS,
    MAX_SCORE,
    MAX_SECONDS,
    MAX_STAGES,
    MAX_TEMPERATURE,
    MAX_TEXT_BYTES,
    MAX_UINT64,
    MAX_VOCABULARY,
    MAX_WINDOW_BYTES,
)
from protocol.messages import (
    Ballot,
    Begin,
    Close,
    Closed,
    ControlMessage,
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
from protocol.tensors import DType, Tensor, tensor_from_tokens


def values(max_leaves: int = 40) -> st.SearchStrategy[Value]:
    """Values that have a canonical form; no deeper than allowed."""
    scalars: st.SearchStrategy[Value] = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=40),
        st.binary(max_size=300),
    )
    value = scalars
    for _ in range(5):
        value = st.one_of(
            scalars, st.lists(value, max_size=max_leaves // 8), st.dictionaries(st.text(), value, max_size=5)
        )
    return value


def presentable(max_bytes: int, min_size: int = 0) -> st.SearchStrategy[str]:
    """Text without control characters."""
    characters = st.characters(exclude_categories=("Cc", "Cs"))
    return st.text(characters, min_size=min_size, max_size=max_bytes // 4)


def pieces(data: bytes) -> st.SearchStrategy[list[bytes]]:
    """All ways to cut bytes into pieces."""
    cuts = st.lists(st.integers(0, len(data)), max_size=12).map(sorted)
    return cuts.map(
        lambda places: [
            part for start, stop in zip([0, *places], [*places, len(data)], strict=True) if (part := data[start:stop])
        ]
    )


names = presentable(MAX_NAME_BYTES, min_size=1)
seconds = st.floats(0, MAX_SECONDS)
counts = st.integers(0, MAX_INTEGER)
model_ids = st.binary(min_size=32, max_size=32).map(lambda raw: ModelId(raw.hex()))
job_ids = st.binary(min_size=16, max_size=16).map(lambda raw: JobId(raw.hex()))
sessions = st.builds(SessionId, job_ids, st.integers(0, MAX_STAGES))
peers: st.SearchStrategy[PeerId] = st.binary(min_size=32, max_size=32).map(peer_id_from_public_key)
block_ranges = st.tuples(st.integers(0, 1023), st.integers(1, 1024)).map(
    lambda pair: BlockRange(min(pair[0], pair[1] - 1), max(pair[0] + 1, pair[1]))
)
loads = st.builds(Load, sessions=counts, queued_rows=counts, free_positions=counts, step_s=seconds)


def with_reasoning(sampling: Sampling) -> st.SearchStrategy[Sampling]:
    """The same with reasoning before its JSON, or without."""
    token = st.integers(0, MAX_VOCABULARY - 1)
    tokens = st.one_of(st.just((None, None)), st.tuples(st.none(), token), st.tuples(token, token))
    return tokens.map(lambda pair: replace(sampling, reasoning_begin=pair[0], reasoning_end=pair[1]))


samplings = st.builds(
    Sampling,
    temperature=st.floats(0, MAX_TEMPERATURE),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, MAX_UINT64),
    max_tokens=st.integers(1, MAX_POSITIONS),
    stop_tokens=st.lists(st.integers(0, MAX_VOCABULARY - 1), max_size=5).map(tuple),
    top_k=st.integers(0, MAX_VOCABULARY),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(1 / MAX_PENALTY, MAX_PENALTY),
    frequency_penalty=st.floats(-MAX_PENALTY, MAX_PENALTY),
    presence_penalty=st.floats(-MAX_PENALTY, MAX_PENALTY),
    logit_bias=st.dictionaries(
        st.integers(0, MAX_VOCABULARY - 1), st.floats(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS), max_size=4
    ).map(lambda biases: tuple(sorted(biases.items()))),
    min_length=st.integers(0, MAX_POSITIONS),
    penalty_window=st.integers(0, MAX_POSITIONS),
    prompt_length=st.integers(0, MAX_POSITIONS),
    logprobs=st.integers(0, MAX_LOGPROBS),
    json_schema=st.sampled_from(["", "{}", '{"type": "object"}']),
).flatmap(lambda sampling: with_reasoning(sampling) if sampling.json_schema else st.just(sampling))
_scoring = st.builds(
    Sampling,
    max_tokens=st.integers(0, MAX_POSITIONS),
    prompt_length=st.integers(1, MAX_POSITIONS),
    logprobs=st.integers(1, MAX_LOGPROBS),
    prompt_logprobs=st.just(True),
)
samplings = samplings | _scoring
_last_or_not = st.one_of(st.tuples(st.none(), samplings, st.none() | peers), st.tuples(peers, st.none(), st.none()))


@st.composite
def opens(draw: st.DrawFn) -> Open:
    """Open for a last stage or another."""
    downstream, sampling, feedback = draw(_last_or_not)
    return Open(
        session=draw(sessions),
        model=draw(model_ids),
        blocks=draw(block_ranges),
        methods=tuple(draw(st.lists(names, min_size=1, max_size=4, unique=True))),
        positions=draw(st.integers(1, MAX_POSITIONS)),
        context=draw(st.dictionaries(names, names | st.floats(-1e18, 1e18), max_size=4)),
        prefix=draw(st.integers(0, 4).flatmap(lambda pages: st.binary(min_size=16 * pages, max_size=16 * pages))),
        upstream=tuple(draw(st.lists(peers, max_size=3))),
        downstream=downstream,
        feedback=feedback,
        sampling=sampling,
        background=draw(st.booleans()),
        request_id=draw(st.sampled_from(["", "req_1"])),
        trace_parent=draw(st.sampled_from(["", f"00-{'ab' * 16}-{'cd' * 8}-01"])),
    )


control_messages: st.SearchStrategy[ControlMessage] = st.one_of(
    st.builds(Hello, agent=names, window_bytes=st.integers(1, MAX_WINDOW_BYTES)),
    opens(),
    st.builds(
        Opened,
        session=sessions,
        load=loads,
        votes=st.dictionaries(names, st.floats(-MAX_SCORE, MAX_SCORE), min_size=1, max_size=4),
        cached=st.dictionaries(names, st.integers(0, MAX_POSITIONS), max_size=4),
        policy=st.dictionaries(*[presentable(64, min_size=1)] * 2, max_size=2),
        held=st.integers(64, MAX_POSITIONS),
        kept_from=st.integers(0, 64),
        statement=st.none() | st.binary(min_size=32, max_size=32),
    ),
    st.builds(
        Begin,
        session=sessions,
        method=names,
        ballots=st.lists(
            st.builds(Ballot, peers, st.lists(st.none() | st.floats(-MAX_SCORE, MAX_SCORE), max_size=4).map(tuple)),
            max_size=3,
        ).map(tuple),
        start=st.integers(0, MAX_POSITIONS - 1),
        onward=st.integers(0, MAX_POSITIONS - 1),
        statement=st.none() | st.binary(min_size=32, max_size=32),
    ),
    st.builds(
        Refused,
        session=sessions,
        reason=st.sampled_from(RefusalReason),
        message=presentable(MAX_TEXT_BYTES),
        load=loads,
        most_positions=st.integers(0, MAX_POSITIONS),
    ),
    st.builds(
        TokenHistory,
        session=sessions,
        tokens=st.lists(st.integers(0, MAX_VOCABULARY - 1), min_size=1, max_size=5).map(tuple),
    ),
    st.builds(ProgressRequest, session=sessions),
    st.builds(
        Progress, session=sessions, **dict.fromkeys(("received", "computed", "sent"), st.integers(0, MAX_POSITIONS))
    ),
    st.builds(TimingsRequest, session=sessions),
    st.builds(
        Timings,
        session=sessions,
        clock_s=st.floats(0, MAX_SECONDS),
        steps=st.lists(
            st.builds(
                StepTiming,
                st.integers(0, MAX_POSITIONS - 1),
                st.integers(0, MAX_POSITIONS),
                *[st.floats(0, MAX_SECONDS)] * 4,
            ),
            max_size=3,
        ).map(tuple),
        dropped=st.integers(0, MAX_INTEGER),
    ),
    st.builds(Credit, session=sessions, consumed_bytes=st.integers(1, MAX_WINDOW_BYTES)),
    st.builds(
        Reroute,
        session=sessions,
        reason=st.sampled_from((FailureReason.DOWNSTREAM, FailureReason.LEAVING)),
        message=presentable(MAX_TEXT_BYTES),
        peer=st.none() | peers,
    ),
    st.builds(
        Failed,
        session=sessions,
        reason=st.sampled_from(FailureReason),
        message=presentable(MAX_TEXT_BYTES),
        peer=st.none() | peers,
    ),
    st.builds(Close, session=sessions),
    st.builds(
        Closed,
        session=sessions,
        statistics=st.builds(
            SessionStatistics,
            steps=counts,
            rows=counts,
            compute_s=seconds,
            queue_s=seconds,
            bytes_in=counts,
            bytes_out=counts,
        ),
    ),
    st.builds(Ping, nonce=st.integers(0, MAX_UINT64)),
    st.builds(Pong, nonce=st.integers(0, MAX_UINT64)),
)


@st.composite
def slices(draw: st.DrawFn, session: SessionId) -> Slice:
    """A few rows of a session."""
    rows = draw(st.integers(1, 6))
    drafts = draw(st.lists(st.integers(0, MAX_VOCABULARY - 1), max_size=rows - 1).map(tuple))
    return Slice(
        session=session,
        position=draw(st.integers(0, MAX_POSITIONS - rows)),
        rows=rows,
        draws=len(drafts) + 1 if drafts else draw(st.integers(0, rows)),
        drafts=drafts,
        finish_reason=draw(st.none() | st.sampled_from(FinishReason)),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Steps of token ids or of hidden states."""
    parts = [draw(slices(session)) for session in draw(st.lists(sessions, min_size=1, max_size=5, unique=True))]
    rows = sum(part.rows for part in parts)
    if draw(st.booleans()):
        tokens = draw(st.lists(st.integers(0, MAX_VOCABULARY - 1), min_size=rows, max_size=rows))
        return Step(slices=tuple(parts), tensor=tensor_from_tokens(tokens))
    dtype = draw(st.sampled_from([DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.INT8, DType.BLOCK_INT8]))
    width = draw(st.integers(1, 20))
    size = rows * dtype.row_bytes(width)
    return Step(slices=tuple(parts), tensor=Tensor(dtype, (rows, width), draw(st.binary(min_size=size, max_size=size))))
