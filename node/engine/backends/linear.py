"""Matrices packed for an arithmetic, and products with them.

Measured for the shapes of SmolLM2 on one core: for one or two rows of fp32 a matrix stored input by output is 1.4 to
1.7 times as fast as its transpose, and never slower. torch's product with int8 weights is the fastest for a few rows
and an order of magnitude slower than fp32 for hundreds, where unpacking the matrix pays.

A product rounds alike however many rows it takes, so that an answer does not depend on which rows are computed
together, and its quality can be measured over whole texts.

On a GPU no product makes a wider copy of a whole matrix: int8 is multiplied by int8, which reads the weights once as
they are held, and what has to be widened is widened piece by piece.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from node.engine.loading import NARROW_DTYPES
from node.engine.widened import multiply_pieces, multiply_widened

_FEW_ROWS = 16
"""Up to here the product with int8 weights beats unpacking them."""

_CUBLAS_ROWS, _CUBLAS_MULTIPLE = 17, 8
"""cuBLAS multiplies int8 from this many rows on, for sizes that are multiples of this."""

_FAST_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Without it torch multiplies bf16 seven times as slowly as fp32 where rows are many."""


_PIECE_ELEMENTS = 1 << 20

_HIGH_DIGIT = 128
"""What the higher of two digits of seven bits counts."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix in one of the packings.

    `parts`: one, or several side by side. `transposed`: stored input by output. `scale`: of int8, for each output, f32.
    """

    parts: tuple[torch.Tensor, ...]
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    transposed: bool = False

    @property
    def matrix(self) -> torch.Tensor:
        """The only part."""
        (matrix,) = self.parts
        return matrix


def pack(
    packing: str, matrices: Sequence[torch.Tensor], bias: torch.Tensor | None, device: torch.device
) -> PackedMatrix:
    """Return matrices (outputs, inputs) that take the same rows, packed as "fp32", "bf16" or "int8" on a device.

    int8 is symmetric, with a scale for each output. Matrices that serve in the type that they were published in are
    not copied on the CPU: their memory is that of the file, which all processes share.
    """
    bias = None if bias is None else bias.to(device)
    narrow = {matrix.dtype for matrix in matrices} <= (NARROW_DTYPES if packing == "fp32" else {torch.bfloat16})
    if narrow and packing != "int8":
        parts = tuple(matrix.to(device) for matrix in matrices)
        if device.type != "cpu" and len(parts) > 1:  # one product is one launch
            parts = (torch.cat(parts),)
        return PackedMatrix(parts, None, bias)
    outputs, inputs = sum(map(len, matrices)), matrices[0].shape[1]
    if packing == "fp32":
        packed = torch.empty(inputs, outputs, device=device)
    else:
        packed = torch.empty(outputs, inputs, device=device, dtype=torch.bfloat16 if packing == "bf16" else torch.int8)
    scale = torch.empty(outputs, device=device) if packing == "int8" else None
    end = 0
    for part in _pieces(matrices):
        start, end = end, end + len(part)
        if scale is None:
            (packed.t() if packing == "fp32" else packed)[start:end].copy_(part)
        else:
            part = part.to(device).float()
            scale[start:end] = part.abs().amax(1).clamp_min(1e-12) / 127
            packed[start:end] = (part / scale[start:end].unsqueeze(1)).round_()
    return PackedMatrix((packed,), scale, bias, transposed=packing == "fp32")


def _pieces(matrices: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield a few outputs after another, so that packing takes little memory beside the result."""
    for matrix in matrices:
        yield from matrix.split(max(1, _PIECE_ELEMENTS // matrix.shape[1]))


Product = Callable[[torch.Tensor, PackedMatrix], torch.Tensor]
"""Rows f32 (rows, inputs) and a matrix to rows f32 (rows, outputs), without the bias."""


def _fp32(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    if weights.transposed:
        return torch.mm(rows, weights.matrix)
    return multiply_widened(rows, weights.parts)


def _fp32_on_gpu(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    return torch.mm(rows, weights.matrix) if weights.transposed else multiply_pieces(rows, weights.matrix)


def _bf16(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    if len(rows) > _FEW_ROWS and not _FAST_BF16:
        return _multiply_rounded(rows, weights.parts)
    return _bf16_on_gpu(rows, weights)


def _bf16_on_gpu(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    narrow = rows.bfloat16()
    products = [torch.nn.functional.linear(narrow, part).float() for part in weights.parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _multiply_rounded(rows: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what a product in bf16 does, rows and result rounded to it, as f32: faster where rows are many."""
    return multiply_widened(rows.bfloat16().float(), matrices).bfloat16().float()


def _int8(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    assert weights.scale is not None
    if len(rows) <= _FEW_ROWS:
        # Its fast kernel takes bf16 only. The scales are applied after it, as they would lose by bf16.
        ones = torch.ones_like(weights.scale, dtype=torch.bfloat16)
        return torch._weight_int8pack_mm(rows.bfloat16(), weights.matrix, ones).float().mul_(weights.scale)  # noqa: SLF001
    return _multiply_rounded(rows, weights.parts).mul_(weights.scale)


def _int8_on_gpu(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    assert weights.scale is not None
    if not multiplies_int8(rows.device, weights.matrix.shape):
        return multiply_pieces(rows.bfloat16(), weights.matrix).float().mul_(weights.scale)
    # Rows as fixed-point numbers of 14 bits and a sign, in two digits: the weights are read once for both, and less is
    # rounded off than in bf16.
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(127 * _HIGH_DIGIT)
    fixed = (rows / scale).round_()
    high = (fixed / _HIGH_DIGIT).round_()
    digits = torch.cat([high, fixed - high * _HIGH_DIGIT]).to(torch.int8)
    high_product, low_product = _int8_product(digits, weights.matrix).chunk(2)
    return high_product.mul_(_HIGH_DIGIT).add_(low_product).mul_(scale).mul_(weights.scale)


def _w8a8(rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    assert weights.scale is not None
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(127)
    quantised = (rows / scale).round_().to(torch.int8)
    return _int8_product(quantised, weights.matrix).mul_(scale).mul_(weights.scale)


def _int8_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return the product of int8 and int8 as f32."""
    count = len(rows)
    if rows.device.type != "cpu":
        if not multiplies_int8(rows.device, matrix.shape):
            return multiply_pieces(rows.float(), matrix)
        if count < _CUBLAS_ROWS:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, _CUBLAS_ROWS - count))
    return torch._int_mm(rows, matrix.t())[:count].float()  # noqa: SLF001  # torch has no public one


def multiplies_int8(device: torch.device, shape: Sequence[int]) -> bool:
    """Return whether a device multiplies int8 by matrices of a shape."""
    return not any(size % _CUBLAS_MULTIPLE for size in shape) and _has_int8_products(device)


@cache
def _has_int8_products(device: torch.device) -> bool:
    """Try it: old GPUs have none, and torch has none for some makes."""
    ones = torch.ones(2 * _CUBLAS_ROWS, 2 * _CUBLAS_MULTIPLE, dtype=torch.int8, device=device)
    try:
        torch._int_mm(ones, ones[: 2 * _CUBLAS_MULTIPLE].t()).sum().item()  # noqa: SLF001
    except (RuntimeError, NotImplementedError):
        return False
    return True


ARITHMETICS: Mapping[str, tuple[str, Product]] = {
    "fp32": ("fp32", _fp32),
    "bf16": ("bf16", _bf16),
    "int8": ("int8", _int8),
    "w8a8": ("int8", _w8a8),
}
"""The packing and the product of each arithmetic on a CPU; those of int8 share their weights."""

GPU_ARITHMETICS: Mapping[str, tuple[str, Product]] = {
    **ARITHMETICS,
    "fp32": ("fp32", _fp32_on_gpu),
    "bf16": ("bf16", _bf16_on_gpu),
    "int8": ("int8", _int8_on_gpu),
}
"""The same on a GPU."""


def arithmetics_on(device: torch.device) -> Mapping[str, tuple[str, Product]]:
    """Return the arithmetics of a device."""
    return ARITHMETICS if device.type == "cpu" else GPU_ARITHMETICS


def multiply(product: Product, rows: torch.Tensor, weights: PackedMatrix) -> torch.Tensor:
    """Return rows times a matrix, with its bias."""
    result = product(rows, weights)
    return result if weights.bias is None else result.add_(weights.bias)
