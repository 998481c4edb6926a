"""The engine of one span of one model and its sessions, in this process and thread."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from node.engine.activation_codec import check_rows, decode_rows, encode_rows
from node.engine.backends.batched import FAMILIES, empty_kv_blocks, refusal
from node.engine.backends.interface import BACKENDS, Backend, BackendContext, BackendSpec, Rows, SpanRunner
from node.engine.device import CPU
from node.engine.device_probe import free_bytes, is_lost, synchronize
from node.engine.interface import (
    DIVISIBLE_ENGINES,
    PAGE_POSITIONS,
    REFERENCE,
    BadRows,
    EngineError,
    EngineOptions,
    SessionNotOpen,
    SessionOptions,
    ShardSource,
    SliceFault,
    SliceInput,
    SliceOutput,
    SpanInfo,
    StepFailed,
    StepResult,
    Variant,
    VariantNotReady,
)
from node.engine.kv_allocator import KvReservation, check_slice
from node.engine.kv_cache import KvCache, SlotMapping
from node.engine.loading import NARROW_DTYPES, LoadedSpan, config_from, load_span
from node.engine.mapped_files import trim_heap
from node.engine.memory_plan import PLANNED_POSITIONS
from node.engine.reference import Reference
from node.engine.sampling import TokenCounts, draw_and_verify, history_for
from node.util.disk_cache import FolderCache
from node.util.text import one_line
from protocol.identity import BlockRange, SessionId
from protocol.limits import MAX_POSITIONS
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

_FREE_MEMORY_SHARE = 0.5
"""Of the free memory, by default."""

_VARIANT_SHARE = 0.5
"""Limit of more variants' weights, of the memory beside the published ones; the rest is KV memory."""


@dataclass(slots=True)
class _Session:
    options: SessionOptions
    info: SpanInfo
    """Of the part of the span that it runs."""
    positions: int
    slots: SlotMapping
    length: int
    """Positions whose keys and values are in KV memory."""
    history: TokenCounts | None
    """Where draws depend on the tokens so far."""


@dataclass(slots=True)
class _Batch:
    """The slices of a step, and their outcomes by number."""

    slices: Sequence[SliceInput]
    sessions: dict[int, _Session] = field(default_factory=dict)
    rows: dict[int, Rows] = field(default_factory=dict)
    outputs: dict[int, SliceOutput] = field(default_factory=dict)
    faults: dict[int, SliceFault] = field(default_factory=dict)

    def fail(self, number: int, error: Exception) -> None:
        message = str(error)
        if not isinstance(error, EngineError):
            message = f"the forward pass failed: {' '.join(message.split())[:300]}"
        self.faults[number] = SliceFault(self.slices[number].session, message, isinstance(error, BadRows))


class Shard:
    """Serves a span as Engine describes it, synchronously; the KV allocator runs elsewhere.

    Weights are mapped from their files; each variant packs its own from there. The reference is available, but not
    loaded, unless nothing else can serve the architecture.
    """

    def __init__(self, source: ShardSource, blocks: BlockRange, options: EngineOptions) -> None:
        started_s = time.perf_counter()
        self._device = torch.device(options.device)
        is_packable = config_from(source.config).model_type in FAMILIES
        dtype, place = (None, torch.device(CPU)) if is_packable else (torch.float32, self._device)
        span = load_span(source, blocks, dtype, place, options.memory_bytes)
        self._span = span
        self._refusal = refusal(span)
        self._reference = Reference(span, source, blocks, self._device)
        kv_blocks = self._reference.load() if self._refusal else empty_kv_blocks(span, self._device)
        kv_bytes_per_position = sum(block.bytes_per_position for block in kv_blocks)
        memory_bytes = options.memory_bytes
        if memory_bytes is None:
            # Pages of mapped files count as free.
            unloaded_bytes = 0 if self._device.type == CPU or self._refusal else span.weight_bytes
            free = max(0, free_bytes(self._device) - unloaded_bytes)
            memory_bytes = span.weight_bytes + int(free * _FREE_MEMORY_SHARE)
        position_bytes = kv_bytes_per_position + (4 * span.hidden_size if options.plan_rows else 0)
        max_positions = min(span.max_positions or MAX_POSITIONS, MAX_POSITIONS)
        most_packed_bytes = 0 if self._refusal else _packed_bytes(span, self._device)
        kv_positions = _kv_positions(
            options, memory_bytes, span.weight_bytes, most_packed_bytes, position_bytes, max_positions
        )
        self.info = SpanInfo(
            model=source.model,
            blocks=blocks,
            block_count=span.block_count,
            hidden_size=span.hidden_size,
            vocabulary_size=span.vocabulary_size,
            max_positions=max_positions,
            kv_bytes_per_position=kv_bytes_per_position,
            kv_positions=kv_positions,
            weight_bytes=span.weight_bytes,
            load_s=time.perf_counter() - started_s,
        )
        self._packed_bytes = memory_bytes - kv_positions * position_bytes
        """Limit of all variants' weights."""
        self._kv = KvCache([block.resized(kv_positions) for block in kv_blocks])
        embedding: Any = span.model.get_input_embeddings()
        self._context = BackendContext(
            span,
            self._device,
            embedding.weight.to(self._device) if span.is_first and is_packable else None,
            f"{source.model}-{blocks.start}-{blocks.end}",
            torch.get_num_threads(),
            None if options.cache_dir is None else FolderCache(options.cache_dir),
        )
        self._backends: dict[str, Backend] = {}
        self._runners: dict[Variant, SpanRunner] = {}
        """But for the reference."""
        self._taken_bytes: dict[tuple[str, str], int] = {}
        """By engine and packing: variants of the same share their weights."""
        self._sessions: dict[SessionId, _Session] = {}

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are available; all but the reference are loaded."""
        return frozenset({REFERENCE, *self._runners})

    def prepare(self, variant: Variant) -> None:
        """Build a variant and warm it; may run beside `step` in a thread of its own, one at a time.

        Raises EngineError where it is unavailable: no such variant, not for this architecture, or too little memory.
        """
        if variant == REFERENCE:
            self._load_reference()
            return
        if variant in self._runners:
            return
        spec = BACKENDS.get(variant.engine)
        packing = spec.packings.get(variant.arithmetic) if spec else None
        if spec is None or packing is None:
            raise EngineError(f"there is no variant {variant}")
        if self._refusal:
            raise EngineError(self._refusal)
        if not self._runs_here(spec):
            raise EngineError(f"{variant} calculates on the CPU, and this span lies on {self._device}")
        needed = int(self._span.element_count * spec.element_bytes(packing, self._span.dtype.itemsize))
        shared = (variant.engine, packing)
        if shared not in self._taken_bytes:
            self._check_memory(variant, needed)
        self._runners[variant] = self._backend(variant.engine).build(variant.arithmetic, self._kv)
        self._taken_bytes[shared] = needed
        trim_heap()

    def _check_memory(self, variant: Variant, needed: int) -> None:
        free = self._packed_bytes - sum(self._taken_bytes.values())
        if needed > free:
            raise EngineError(f"{variant} takes {needed} bytes of memory, of which {max(0, free)} are left")

    def _load_reference(self) -> SpanRunner:
        runner = self._reference.runner
        if runner is None:
            self._check_memory(REFERENCE, self._reference.needed_bytes)
            self._taken_bytes[REFERENCE] = self._reference.needed_bytes
            self._reference.load()
            runner = self._reference.runner
        assert runner is not None
        return runner

    def unload_reference(self) -> None:
        """Give the reference's memory back until a session wants it, unless nothing else can serve the span."""
        if self._refusal is None:
            # Matrices in two bytes serve as they lie in the file, whose pages stay then.
            is_file_used = self._span.dtype in NARROW_DTYPES and any(each.engine == "fused" for each in self._runners)
            self._reference.unload(keep_pages=is_file_used)
            self._taken_bytes.pop(REFERENCE, None)
            trim_heap()

    def start_threads(self, variant: Variant) -> None:
        """Start the threads that a variant's steps will need; see Backend."""
        if variant.engine in BACKENDS and self._runs_here(BACKENDS[variant.engine]):
            self._backend(variant.engine).start_threads()

    def _runs_here(self, spec: BackendSpec) -> bool:
        return self._device.type == "cpu" or not spec.cpu_only

    def _backend(self, engine: str) -> Backend:
        if engine not in self._backends:
            self._backends[engine] = BACKENDS[engine].open(self._context)
        return self._backends[engine]

    def begin(self, session: SessionId, options: SessionOptions, reservation: KvReservation) -> None:
        """Begin a session on its pages; raise EngineError for a variant that is not ready."""
        if options.variant not in self.variants():
            raise VariantNotReady(f"the variant {options.variant} is not ready here")
        info = self.info.part(options.blocks)
        if info is not self.info and options.variant.engine not in DIVISIBLE_ENGINES:
            raise VariantNotReady(f"the variant {options.variant} runs the whole span or nothing")
        self._kv.copy(reservation.copied, reservation.pages[: len(reservation.copied)])
        slots = SlotMapping(reservation.pages)
        history = history_for(options.sampling)
        self._sessions[session] = _Session(options, info, reservation.positions, slots, reservation.cached, history)

    def run_alone(self, variant: Variant, rows: npt.NDArray[Any], *, draws: int) -> npt.NDArray[np.float32]:
        """Return hidden states of rows from position 0 on or, on a last span, logits after the last `draws` of them.

        For quality measurements, without sessions: it writes into any pages. `rows`: token ids i64 (rows,) on a
        first span, hidden states f32 (rows, hidden size) elsewhere.
        """
        given, pages = torch.from_numpy(rows).to(self._device), range(-(-len(rows) // PAGE_POSITIONS))
        [computed] = self._compute(variant, self.info.blocks, [Rows(given, SlotMapping(pages), 0, draws)])
        return computed.float().cpu().numpy()

    def rename(self, session: SessionId, successor: SessionId) -> None:
        """Give a session another id; an unknown one is ignored."""
        if (found := self._sessions.pop(session, None)) is not None:
            self._sessions[successor] = found

    def close(self, session: SessionId) -> None:
        """Drop a session; an unknown one is ignored."""
        self._sessions.pop(session, None)

    def step(self, slices: Sequence[SliceInput]) -> StepResult:
        """Run the slices, those of a variant together. Sessions whose slices fail are closed; see Engine."""
        started_s = time.perf_counter()
        batch = _Batch(slices)
        try:
            for (variant, blocks), numbers in self._grouped(batch).items():
                # The reference computes sessions one by one anyway.
                for part in [[number] for number in numbers] if variant == REFERENCE else [numbers]:
                    self._run(batch, variant, blocks, part)
        except EngineError:
            for rows in slices:
                self.close(rows.session)
            raise
        for fault in batch.faults.values():
            self.close(fault.session)
        faults = tuple(fault for _, fault in sorted(batch.faults.items()))
        if faults and not batch.outputs:
            raise StepFailed(faults)
        outputs = tuple(output for _, output in sorted(batch.outputs.items()))
        return StepResult(outputs=outputs, compute_s=time.perf_counter() - started_s, faults=faults)

    def _grouped(self, batch: _Batch) -> dict[tuple[Variant, BlockRange], list[int]]:
        """Return the valid slices, by number, grouped by variant and blocks."""
        groups: dict[tuple[Variant, BlockRange], list[int]] = {}
        counts = Counter(rows.session for rows in batch.slices)
        for number, rows in enumerate(batch.slices):
            try:
                session = batch.sessions[number] = self._session_of(rows, alone=counts[rows.session] == 1)
                prepared = self._input(rows.tensor, session.info)
            except EngineError as error:
                batch.fail(number, error)
                continue
            batch.rows[number] = Rows(prepared, session.slots, rows.position, rows.draws)
            groups.setdefault((session.options.variant, session.info.blocks), []).append(number)
        return groups

    def _run(self, batch: _Batch, variant: Variant, blocks: BlockRange, numbers: Sequence[int]) -> None:
        """Run slices together; where that fails, each half of them again, until those that fail are alone.

        The next pass overwrites the positions that a failed one wrote. Raises EngineError where the device is lost.
        """
        try:
            computed = self._compute(variant, blocks, [batch.rows[number] for number in numbers])
            synchronize(self._device)  # it may still be running
        except Exception as error:  # torch fails in many ways
            if is_lost(error):
                raise EngineError(f"the forward pass failed: {one_line(error)}") from error
            if len(numbers) == 1:
                batch.fail(numbers[0], error)
                return
        else:
            for number, output in zip(numbers, computed, strict=True):
                rows, session = batch.slices[number], batch.sessions[number]
                try:
                    tensor = self._output(rows, session, output)
                except EngineError as error:  # never BadRows: the input was checked, so the fault is here
                    batch.fail(number, EngineError(str(error)))
                    continue
                session.length = rows.position + rows.tensor.rows
                batch.outputs[number] = SliceOutput(session=rows.session, tensor=tensor)
            return
        middle = len(numbers) // 2
        for half in (numbers[:middle], numbers[middle:]):
            self._run(batch, variant, blocks, half)

    def _compute(self, variant: Variant, blocks: BlockRange, parts: Sequence[Rows]) -> Sequence[torch.Tensor]:
        """Return the output of each part: hidden states, or logits behind the model's last block."""
        run = range(blocks.start - self.info.blocks.start, blocks.end - self.info.blocks.start)
        runner = self._load_reference() if variant == REFERENCE else self._runners[variant]
        return runner.run(parts, self._kv, run)

    def _session_of(self, rows: SliceInput, *, alone: bool) -> _Session:
        if not alone:
            raise EngineError("a session has more than one slice in a step")
        session = self._sessions.get(rows.session)
        if session is None:
            raise SessionNotOpen(rows.session)
        check_slice(session.info, rows, cached=session.length, reserved=session.positions)
        return session

    def _output(self, rows: SliceInput, session: _Session, output: torch.Tensor) -> Tensor:
        if not session.info.is_last:
            states = output.cpu().numpy()
            check_rows(states)
            return encode_rows(states, session.options.activations)
        sampling = session.options.sampling
        assert sampling is not None
        first_drawn = rows.position + rows.tensor.rows - rows.draws + 1
        history = session.history
        if history is not None and rows.history is not None:
            history.reset(rows.history)
        return tensor_from_tokens(draw_and_verify(output.cpu().numpy(), sampling, first_drawn, rows.drafts, history))

    def _input(self, tensor: Tensor, info: SpanInfo) -> torch.Tensor:
        """Return rows as the model takes them; token ids are checked, as torch may crash on bad ones."""
        if not info.is_first:
            return torch.from_numpy(decode_rows(tensor)).to(self._device)
        tokens = tokens_from_tensor(tensor)
        if min(tokens) < 0 or max(tokens) >= self.info.vocabulary_size:
            raise BadRows(f"a token id is not below {self.info.vocabulary_size}")
        return torch.tensor(tokens, device=self._device)


def open_torch_shard(source: ShardSource, blocks: BlockRange, options: EngineOptions) -> Shard:
    """Return a shard. Raises EngineError where it cannot be built, also for errors of a GPU and its driver."""
    try:
        return Shard(source, blocks, options)
    except torch.OutOfMemoryError:
        raise EngineError(f"{options.device} has too little memory left: see --memory") from None
    except RuntimeError as error:
        if options.device == CPU:
            raise
        raise EngineError(f"{options.device} failed: {one_line(error, 200)}") from None


def _packed_bytes(span: LoadedSpan, device: torch.device) -> int:
    """Return what all variants together take on a device."""
    element_bytes = sum(
        spec.element_bytes(packing, span.dtype.itemsize)
        for spec in BACKENDS.values()
        if device.type == CPU or not spec.cpu_only
        for packing in spec.packed_bytes
    )
    return int(element_bytes * span.element_count)


def _kv_positions(
    options: EngineOptions,
    memory_bytes: int,
    weight_bytes: int,
    packed_bytes: int,
    position_bytes: int,
    max_positions: int,
) -> int:
    """Return how many positions, in whole pages, fit beside the published weights and more variants'.

    These have no room where the planned positions would not fit beside them.
    """
    page_bytes = max(1, position_bytes * PAGE_POSITIONS)
    free_bytes = memory_bytes - weight_bytes
    planned_pages = -(-min(PLANNED_POSITIONS, max_positions) // PAGE_POSITIONS)
    pages = (free_bytes - max(0, min(int(free_bytes * _VARIANT_SHARE), packed_bytes))) // page_bytes
    pages = max(pages, min(planned_pages, free_bytes // page_bytes))
    if pages < 1:
        raise EngineError(
            f"{memory_bytes} bytes of memory are not enough: the weights take {weight_bytes}, "
            f"and each page of {PAGE_POSITIONS} positions {page_bytes}"
        )
    if options.kv_positions is not None:
        pages = min(pages, -(-options.kv_positions // PAGE_POSITIONS))
    return pages * PAGE_POSITIONS
