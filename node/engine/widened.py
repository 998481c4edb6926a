"""Products in f32 with matrices that are held as bf16 or fp16, in half the memory.

Each number of a narrow float is one of f32, too, so that this is exact. The matrix is widened piece by piece, into a
buffer that stays in the cache of a core: a token then costs half the reads of memory that it costs with a matrix in
f32, which makes up for the conversion. The pieces are divided among threads of our own, once for each product: torch
would have its threads meet for each piece. Other devices widen larger pieces, one after another.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch

_PIECE_ELEMENTS = 1 << 18
"""A megabyte of f32."""

_GPU_PIECE_ELEMENTS = 1 << 24
"""Of a matrix on a GPU, that are widened at a time."""

_own = threading.local()


@cache
def widening_threads(count: int) -> ThreadPoolExecutor:
    """Return the threads of this process's products; the first call starts them, with the priority of its thread."""
    pool = ThreadPoolExecutor(count, "widening", initializer=torch.set_num_threads, initargs=(1,))
    barrier = threading.Barrier(count)
    for waiting in [pool.submit(barrier.wait) for _ in range(count)]:
        waiting.result()
    return pool


def multiply_widened(rows: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return rows f32 (rows, inputs) times matrices (outputs, inputs) of any type, side by side, as f32."""
    if rows.device.type != "cpu":
        return torch.cat([multiply_pieces(rows, matrix) for matrix in matrices], dim=1)
    threads = torch.get_num_threads()
    result = rows.new_empty(len(rows), sum(map(len, matrices)))
    pieces = _pieces(matrices, threads)
    if threads == 1:
        _multiply(rows, matrices, result, pieces[0])
        return result
    waiting: list[Future[None]] = [
        widening_threads(threads).submit(_multiply, rows, matrices, result, share) for share in pieces
    ]
    for share in waiting:
        share.result()
    return result


def multiply_pieces(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return rows times a matrix (outputs, inputs) of a narrower type, in few pieces, without threads of our own."""
    pieces = matrix.split(max(1, _GPU_PIECE_ELEMENTS // matrix.shape[1]))
    products = [torch.nn.functional.linear(rows, piece.to(rows.dtype)) for piece in pieces]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


_Piece = tuple[int, int, int, int]
"""Number of a matrix, its first and last output in it, and where its first stands in the result."""


def _pieces(matrices: Sequence[torch.Tensor], threads: int) -> list[list[_Piece]]:
    """Return each thread's pieces: consecutive ones, about as many outputs for each."""
    count = max(1, _PIECE_ELEMENTS // matrices[0].shape[1])
    total = sum(map(len, matrices))
    shares: list[list[_Piece]] = [[] for _ in range(threads)]
    offset = 0
    for number, matrix in enumerate(matrices):
        edges = {total * share // threads - offset for share in range(threads)}
        start = 0
        while start < len(matrix):
            end = min([start + count, len(matrix), *(edge for edge in edges if edge > start)])
            shares[(offset + start) * threads // total].append((number, start, end, offset + start))
            start = end
        offset += len(matrix)
    return shares


@torch.inference_mode()
def _multiply(
    rows: torch.Tensor, matrices: Sequence[torch.Tensor], result: torch.Tensor, pieces: Sequence[_Piece]
) -> None:
    for number, start, end, offset in pieces:
        widened = _buffer(end - start, rows.shape[1])
        widened.copy_(matrices[number][start:end])
        if len(rows) == 1:
            torch.mv(widened, rows[0], out=result[0, offset : offset + end - start])
        else:
            torch.mm(rows, widened.t(), out=result[:, offset : offset + end - start])


def _buffer(outputs: int, inputs: int) -> torch.Tensor:
    """Return this thread's buffer in a shape; it is used again."""
    size = max(_PIECE_ELEMENTS, inputs)
    if not hasattr(_own, "buffer") or len(_own.buffer) < size:
        _own.buffer = torch.empty(size)
    buffer: torch.Tensor = _own.buffer
    return buffer[: outputs * inputs].view(outputs, inputs)
