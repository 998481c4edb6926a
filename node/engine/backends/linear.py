"""Matrices packed for an arithmetic, and products with them.

Measured for the shapes of SmolLM2 on one core: for one or two rows of fp32 a matrix stored input by output is 1.4 to
1.7 times as fast as its transpose, and never slower. torch's product with int8 weights is the fastest for a few rows
and an order of magnitude slower than fp32 for hundreds, where unpacking the matrix pays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_FEW_ROWS = 16
"""Up to here the product with int8 weights beats unpacking them."""

_CUBLAS_ROWS, _CUBLAS_MULTIPLE = 17, 8
"""cuBLAS multiplies int8 from this many rows on, for sizes that are multiples of this."""

_FAST_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Without it torch multiplies bf16 seven times as slowly as fp32 where rows are many."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix in one of the packings. `scale`: of int8, for each output, f32."""

    matrix: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None


def pack(packing: str, matrix: torch.Tensor, bias: torch.Tensor | None) -> PackedMatrix:
    """Return a matrix (outputs, inputs) packed as "fp32", "bf16" or "int8" (symmetric, a scale for each output)."""
    if packing == "fp32":
        return PackedMatrix(matrix.t().contiguous(), None, bias)
    if packing == "bf16":
        return PackedMatrix(matrix.bfloat16(), None, bias)
    scale = matrix.abs().amax(1).clamp_min(1e-12) / 127
    return PackedMatrix((matrix / scale.unsqueeze(1)).round_().to(torch.int8), scale, bias)


Product = Callable[[torch.Tensor, PackedMatrix], torch.Tensor]
"""Rows f32 (rows, inputs) and a matrix to rows f32 (rows, outputs), without the bias."""


def _fp32(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    return torch.mm(rows, weights.matrix)


def _bf16(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    if len(rows) > _FEW_ROWS and rows.device.type == "cpu" and not _FAST_BF16:
        return torch.nn.functional.linear(rows, weights.matrix.float())
    return torch.nn.functional.linear(rows.bfloat16(), weights.matrix).float()


def _int8(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    assert weights.scale is not None
    if rows.device.type != "cpu":  # bf16 holds the weights as they are
        return torch.nn.functional.linear(rows.bfloat16(), weights.matrix.bfloat16()).float().mul_(weights.scale)
    if len(rows) <= _FEW_ROWS:
        # Its fast kernel takes bf16 only. The scales are applied after it, as they would lose by bf16.
        ones = torch.ones_like(weights.scale, dtype=torch.bfloat16)
        return torch._weight_int8pack_mm(rows.bfloat16(), weights.matrix, ones).float().mul_(weights.scale)  # noqa: SLF001
    return torch.nn.functional.linear(rows, weights.matrix.float()).mul_(weights.scale)


def _w8a8(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    assert weights.scale is not None
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(127)
    quantised = (rows / scale).round_().to(torch.int8)
    return _int8_product(quantised, weights.matrix).mul_(scale).mul_(weights.scale)


def _int8_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    count = len(rows)
    if rows.device.type != "cpu":
        if any(size % _CUBLAS_MULTIPLE for size in matrix.shape):
            return torch.nn.functional.linear(rows.float(), matrix.float())
        if count < _CUBLAS_ROWS:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, _CUBLAS_ROWS - count))
    return torch._int_mm(rows, matrix.t())[:count].float()  # noqa: SLF001  # torch has no public one


ARITHMETICS: Mapping[str, tuple[str, Product]] = {
    "fp32": ("fp32", _fp32),
    "bf16": ("bf16", _bf16),
    "int8": ("int8", _int8),
    "w8a8": ("int8", _w8a8),
}
"""The packing and the product of each arithmetic; those of int8 share their weights."""


def multiply(product: Product, rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    """Return rows times a matrix, with its bias."""
    result = product(rows, weights)
    return result if weights.bias is None else result.add_(weights.bias)
