"""Pools the hidden states of a prompt into its embedding, chunk by chunk."""

import numpy as np
import numpy.typing as npt

from node.engine.interface import EngineError
from protocol.messages import Sampling
from protocol.tensors import Pooling


class Pool:
    """The rows of one prompt so far. Every row counts once and none can be taken back, so a replay begins anew."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._count = 0
        self._pooled: npt.NDArray[np.float64] | None = None
        """The sum of all rows, or the last one."""

    def add(self, position: int, states: npt.NDArray[np.float32]) -> None:
        """Add rows from a position on. Raises EngineError unless they follow those before."""
        if position != self._count:
            raise EngineError(f"an embedding has {self._count} rows so far, and cannot go on at position {position}")
        self._count += len(states)
        if self._pooling is Pooling.LAST:
            self._pooled = states[-1].astype(np.float64)
        else:
            added = states.sum(axis=0, dtype=np.float64)
            self._pooled = added if self._pooled is None else self._pooled + added

    def embedding(self) -> npt.NDArray[np.float32]:
        """Return the embedding, f32 (1, hidden size). Raises EngineError where it is not finite."""
        if self._pooled is None:
            raise EngineError("an embedding of no rows")
        pooled = self._pooled if self._pooling is Pooling.LAST else self._pooled / self._count
        if not np.isfinite(pooled).all():
            raise EngineError("the hidden states are not finite: the model cannot process this input")
        return pooled.astype(np.float32)[np.newaxis]


def pool_for(sampling: Sampling | None) -> Pool | None:
    """Return an empty pool where the prompt's embedding is wanted."""
    return None if sampling is None or sampling.pooling is None else Pool(sampling.pooling)
