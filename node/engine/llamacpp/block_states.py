"""The hidden states behind a block, taken out of a pass of llama.cpp."""

import numpy as np
import numpy.typing as npt

from node.engine.llamacpp.library import EvalCallback, Library


class BlockStates:
    """Takes the hidden states behind a block, or behind the final norm, as llama.cpp computes them."""

    def __init__(self, library: Library, hidden_size: int) -> None:
        self._library = library
        self.name: bytes | None = None
        self._hidden_size = hidden_size
        self.taken: list[npt.NDArray[np.float32]] = []
        self.callback = EvalCallback(self._evaluated)

    def expect(self, name: bytes | None) -> None:
        """Take the tensor of this name from now on; None for the whole graph, and none of them."""
        self.name = name

    def _evaluated(self, tensor: int, ask: bool, _: object) -> bool:
        """Take the tensor, and end the graph there: what follows is of other spans."""
        library = self._library
        if self.name is None or library.ggml_get_name(tensor) != self.name:
            return not ask
        if ask:
            return True
        size = library.ggml_nbytes(tensor)
        states = np.empty((size // (4 * self._hidden_size), self._hidden_size), np.float32)
        library.ggml_backend_tensor_get(tensor, states.ctypes.data, 0, size)
        self.taken.append(states)
        return False
