"""The input embedding of a first span that is not the last, looked up here and not in llama.cpp.

llama.cpp would compute, or hold memory for, logits over the whole vocabulary for every row that leaves such a span. A
row is widened by the very function that llama.cpp widens it with, so the values are the same to the bit.
"""

import ctypes
import math
import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from node.engine.interface import EngineError
from node.engine.llamacpp.library import Library
from node.models.gguf_file import GgufModel, GgufTensor

_SCALED_BY_WIDTH: Final = ("gemma",)
"""Architectures whose embeddings of tokens, and only these, llama.cpp multiplies by the root of their width."""


class Embedding:
    """A matrix of a row for each token, in its file."""

    def __init__(self, library: Library, common: GgufModel, tensor: GgufTensor) -> None:
        self.rows_count, self._width = tensor.shape
        self._row_bytes = tensor.size_bytes // self.rows_count
        start = tensor.offset - tensor.offset % mmap.ALLOCATIONGRANULARITY
        with tensor.path.open("rb") as file:
            size = tensor.offset + tensor.size_bytes - start
            self._mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start)
        raw = np.frombuffer(self._mapped, np.uint8, tensor.size_bytes, tensor.offset - start)
        self._raw = raw.reshape(self.rows_count, self._row_bytes)
        self._widen: Any = None
        if tensor.type is not GGMLQuantizationType.F32:
            self._widen = library.widening(tensor.type)
            if not self._widen:
                raise EngineError(f"llama.cpp cannot read embeddings of type {tensor.type.name}")
        scaled = common.architecture.startswith(_SCALED_BY_WIDTH)
        self._scale = np.float32(math.sqrt(self._width)) if scaled else None

    def rows(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the rows of tokens, which are below the number of rows."""
        taken = np.ascontiguousarray(self._raw[tokens])
        if self._widen is None:
            rows = taken.view(np.float32)
        else:
            rows = np.empty((len(tokens), self._width), np.float32)
            self._widen(taken.ctypes.data, rows.ctypes.data, ctypes.c_int64(rows.size))
        return rows if self._scale is None else rows * self._scale
