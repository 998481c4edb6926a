"""Who may hold KV memory, and which rows an engine takes. Pure rules, shared by the real engines and the fake one."""

from node.engine.interface import EngineError, EngineFull, SliceInput, SpanInfo
from protocol.identity import SessionId
from protocol.messages import Sampling
from protocol.tensors import DType

_HIDDEN_DTYPES = frozenset({DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16})


class Reservations:
    """KV positions that sessions hold; together never more than the engine has."""

    def __init__(self, info: SpanInfo) -> None:
        self._info = info
        self._positions: dict[SessionId, int] = {}
        self.total = 0
        """Positions reserved by all sessions together."""

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, session: SessionId) -> bool:
        return session in self._positions

    def open(self, session: SessionId, positions: int, sampling: Sampling | None) -> None:
        """Reserve; raise EngineFull while there is no room, EngineError for what makes no sense."""
        if session in self._positions:
            raise EngineError(f"session {session.job}/{session.stage} is open already")
        if not 1 <= positions <= self._info.max_positions:
            raise EngineError(f"a session has 1 to {self._info.max_positions} positions, not {positions}")
        if self._info.is_last and sampling is None:
            raise EngineError("the last span draws tokens: a session on it needs to say how")
        free = self._info.kv_positions - self.total
        if positions > free:
            raise EngineFull(
                f"no KV memory for {positions} positions: {free} of {self._info.kv_positions} are free on this span"
            )
        self._positions[session] = positions
        self.total += positions

    def close(self, session: SessionId) -> bool:
        """Free what a session holds; return whether it was open."""
        positions = self._positions.pop(session, None)
        self.total -= positions or 0
        return positions is not None

    def of(self, session: SessionId) -> int:
        """Return the positions reserved for a session; raise EngineError for one that is not open."""
        try:
            return self._positions[session]
        except KeyError:
            raise EngineError(f"session {session.job}/{session.stage} is not open") from None


def check_slice(info: SpanInfo, rows: SliceInput, *, cached: int, reserved: int) -> None:
    """Raise EngineError unless the rows follow what is cached and fit into what is reserved.

    `cached`: positions of the session whose keys and values the engine holds. `reserved`: positions it may hold.
    """
    count = rows.tensor.rows
    if count < 1 or not 0 <= rows.draws <= count:
        raise EngineError(f"a slice of {count} rows cannot draw {rows.draws} tokens")
    if not 0 <= rows.position <= cached:
        raise EngineError(f"rows from position {rows.position} on do not follow the {cached} that are cached")
    if rows.position + count > reserved:
        raise EngineError(f"{count} rows at position {rows.position} exceed the {reserved} positions reserved")
    if info.is_first:
        if rows.tensor.dtype is not DType.INT32 or len(rows.tensor.shape) != 1:
            raise EngineError(f"the first span takes token ids, not {rows.tensor.dtype}{list(rows.tensor.shape)}")
    elif rows.tensor.dtype not in _HIDDEN_DTYPES or rows.tensor.shape[1:] != (info.hidden_size,):
        raise EngineError(
            f"this span takes hidden states of {info.hidden_size} elements, "
            f"not {rows.tensor.dtype}{list(rows.tensor.shape)}"
        )
