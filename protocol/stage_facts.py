"""Stage facts: what of a stage's machine, and of its link to the next stage, decides how fast it is and what it costs.

They are taken from the signed capability records when a job is planned, travel with the task context that the stages
vote on, and are part of the job's observation, so that whoever reads it needs nothing else. No name is among them:
what is learned of one machine carries over to others with the same figures.
"""

import enum
from dataclasses import dataclass
from typing import Annotated, Final

from protocol.figures import (
    MAX_MEMORY_BYTES,
    MAX_ROUND_TRIP_S,
    USUAL_PRICE,
    BytesPerSecond,
    Cores,
    OperationsPerSecond,
    Price,
)
from protocol.limits import MAX_BLOCKS
from protocol.schema import Nullable, Range

MAX_VECTOR_BITS: Final = 1 << 16


class DeviceKind(enum.StrEnum):
    """What computes a stage."""

    CPU = "cpu"
    CUDA = "cuda"
    ROCM = "rocm"
    MPS = "mps"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """Facts of one stage; None: not measured.

    `blocks`: how many it runs. `memory_bytes`: of the device. `threads`: of the engine. `vector_bits`: of the widest
    vector instructions, 0 where unknown. `bf16`, `int8`, `matrix_unit`: whether the processor has instructions for
    products of these numbers, and of whole tiles. `round_trip_s`, `link_bytes_per_s`: of the link to the next stage,
    of the last stage to the first. `price`: of a second of computing.
    """

    blocks: Annotated[int, Range(1, MAX_BLOCKS)]
    device: DeviceKind
    memory_bytes: Annotated[int, Range(1, MAX_MEMORY_BYTES)]
    threads: Cores
    vector_bits: Annotated[int, Range(0, MAX_VECTOR_BITS)] = 0
    bf16: bool = False
    int8: bool = False
    matrix_unit: bool = False
    memory_read_bytes_per_s: Nullable[BytesPerSecond] = None
    fp32_flop_per_s: Nullable[OperationsPerSecond] = None
    bf16_flop_per_s: Nullable[OperationsPerSecond] = None
    int8_op_per_s: Nullable[OperationsPerSecond] = None
    round_trip_s: Nullable[Annotated[float, Range(0.0, MAX_ROUND_TRIP_S)]] = None
    link_bytes_per_s: Nullable[BytesPerSecond] = None
    price: Price = USUAL_PRICE

    @property
    def busy_threads(self) -> int:
        """Threads of the processor that are busy while the stage computes: one where another device does."""
        return self.threads if self.device is DeviceKind.CPU else 1
