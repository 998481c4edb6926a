"""Figures of machines and links, with their bounds."""

from typing import Annotated, Final

from protocol.schema import Range

MAX_CORES: Final = 1 << 16
MAX_MEMORY_BYTES: Final = 1 << 50
MAX_BYTES_PER_S: Final = 1e15
MAX_OPERATIONS_PER_S: Final = 1e19
MAX_ROUND_TRIP_S: Final = 60.0
MAX_PRICE: Final = 1e6
MIN_FIGURE: Final = 1e-9
"""Lower bound of measured figures, so that they can be divided by."""

USUAL_PRICE: Final = 1.0
"""Of a second of computing, where a peer announces none."""

Cores = Annotated[int, Range(1, MAX_CORES)]
MemoryBytes = Annotated[int, Range(1, MAX_MEMORY_BYTES)]
BytesPerSecond = Annotated[float, Range(MIN_FIGURE, MAX_BYTES_PER_S)]
OperationsPerSecond = Annotated[float, Range(MIN_FIGURE, MAX_OPERATIONS_PER_S)]
Price = Annotated[float, Range(0.0, MAX_PRICE)]
