"""Decode steps recorded as CUDA graphs: a GPU then launches a step at once, and not a thousand kernels one by one.

A graph repeats the same kernels on the same memory. So each is of a fixed number of sessions and of pages, both padded
to a power of two, and reads its rows, positions and page tables from buffers that are filled before each replay. It is
recorded when its size first occurs, in the thread that runs the steps: no other thread may wait for the device then.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from node.engine.backends.interface import Capture, Rows, Step
from node.engine.device_probe import synchronize
from node.util.text import one_line

MOST_SESSIONS: Final = 32
"""Of a graph; larger batches have so much to compute that launching them no longer counts."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a recorded step reads.

    `rows`: of each session one, token ids i64 (sessions,) or hidden states f32 (sessions, hidden size). `layout`: i64
    (sessions, 1 + pages), the position of each row and the session's pages in order, of `page_positions` each.
    """

    rows: torch.Tensor
    layout: torch.Tensor
    page_positions: int

    def fill(self, slices: Sequence[Rows]) -> None:
        """Put in what slices with a row each are, and the first of them again for sessions that are missing.

        These write once more what it writes to its own memory.
        """
        count = len(slices)
        rows = torch.cat([part.rows for part in slices])
        self.rows[:count] = rows
        self.rows[count:] = rows[0]
        layout = torch.empty(self.layout.shape, dtype=torch.long)
        for number, part in enumerate(slices):
            pages = part.slots.pages[: layout.shape[1] - 1]
            layout[number, 0] = part.position
            layout[number, 1 : 1 + len(pages)] = pages
            layout[number, 1 + len(pages) :] = pages[0]  # not read: nothing is visible there
        layout[count:] = layout[0]
        self.layout.copy_(layout)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """`step`: whose tensors the graph reads and does not own."""

    inputs: DecodeInputs
    step: Step
    replay: Step


class DecodeGraphs:
    """The recorded steps of a span in one variant, over one KV memory."""

    def __init__(self, make_step: Callable[[DecodeInputs], Step], capture: Capture, *, most_positions: float) -> None:
        """`most_positions`: of all sessions together and with padding, that a step may read."""
        self._make_step = make_step
        self._capture: Capture | None = capture
        self._most_positions = most_positions
        self._recorded: dict[tuple[int, int], _Recorded | None] = {}
        """By the numbers of sessions and of pages; None where that failed."""

    def run(self, slices: Sequence[Rows]) -> torch.Tensor | None:
        """Return the output of slices, in order, until the next call; None where they have to be computed otherwise."""
        if len(slices) > MOST_SESSIONS or any(len(part.rows) > 1 for part in slices):
            return None
        page_positions = slices[0].slots.page_positions
        sessions = _padded(len(slices))
        pages = _padded(max(part.position // page_positions + 1 for part in slices))
        if sessions * pages * page_positions > self._most_positions:
            return None
        if (sessions, pages) not in self._recorded and self._capture is not None:
            self._recorded[sessions, pages] = self._record(slices, sessions, pages, self._capture)
        recorded = self._recorded.get((sessions, pages))
        if recorded is None:
            return None
        recorded.inputs.fill(slices)
        return recorded.replay()[: len(slices)]

    def _record(self, slices: Sequence[Rows], sessions: int, pages: int, capture: Capture) -> _Recorded | None:
        row = slices[0].rows
        layout = torch.zeros(sessions, 1 + pages, dtype=torch.long, device=row.device)
        inputs = DecodeInputs(row.new_empty(sessions, *row.shape[1:]), layout, slices[0].slots.page_positions)
        inputs.fill(slices)
        step = self._make_step(inputs)
        try:
            return _Recorded(inputs, step, capture(step))
        except RuntimeError as error:
            synchronize(row.device)  # raises where not only the recording is lost, but the GPU
            which = f"decode steps of {sessions} sessions over {pages} pages are not recorded"
            if not isinstance(error, torch.OutOfMemoryError):
                which, self._capture = "no more decode steps are recorded", None
            sys.stderr.write(f"{which}: {one_line(error, 200)}\n")
            return None


class CudaCapture:
    """Records CUDA graphs, whose intermediate results share memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, step: Step) -> Step:
        """See Capture. The step runs once before, so that libraries have allocated what they need."""
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    step()
                current.wait_stream(self._stream)
                graph = torch.cuda.CUDAGraph()
                # Other threads may allocate memory meanwhile, as the one does that packs variants.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    output = step()
            finally:
                # A recording whose end fails leaves its stream in place: what is computed later would not wait for
                # what other threads do on the usual one.
                torch.cuda.set_stream(current)
        return partial(_replay, graph, output)


def capture_on(device: torch.device) -> Capture | None:
    """Return what records steps on a device, if anything does."""
    return CudaCapture(device) if device.type == "cuda" else None


def _replay(graph: "torch.cuda.CUDAGraph", output: torch.Tensor) -> torch.Tensor:
    graph.replay()
    return output


def _padded(count: int) -> int:
    """Return the next power of two."""
    return 1 << (count - 1).bit_length()
