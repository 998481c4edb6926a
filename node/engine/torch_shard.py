"""The engine of one span of one model and its sessions, in this process and thread."""

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from node.engine.backends.batched import empty_kv_blocks, refusal
from node.engine.backends.decode_graphs import capture_on
from node.engine.backends.interface import BACKENDS, Backend, BackendContext, BackendSpec, Capture, Rows, SpanRunner
from node.engine.device import CPU
from node.engine.device_probe import free_bytes, is_lost, synchronize
from node.engine.interface import (
    AUTO,
    PAGE_POSITIONS,
    REFERENCE,
    EngineError,
    EngineOptions,
    NoVariantMemory,
    ShardSource,
    SpanInfo,
    Variant,
)
from node.engine.kv_allocator import KvReservation
from node.engine.kv_cache import KvCache, SlotMapping
from node.engine.loading import NARROW_DTYPES, LoadedSpan, describe, load_span
from node.engine.memory_plan import PLANNED_POSITIONS, reserve_bytes
from node.engine.reference import Reference
from node.engine.shard import FREE_MEMORY_SHARE, SessionRows, Shard
from node.util.disk_cache import FolderCache
from node.util.heap import trim_heap
from node.util.text import one_line
from protocol.identity import BlockRange
from protocol.limits import MAX_POSITIONS

_VARIANT_SHARE = 0.5
"""Limit of more variants' weights, of the memory beside the published ones; the rest is KV memory."""

_SERVED_FROM_FILES: Final = {
    Variant("fused", "fp32"): NARROW_DTYPES,
    Variant("fused", "bf16"): frozenset({torch.bfloat16}),
}
"""Variants that compute with matrices as they lie in their files, in these types; others have packed their own."""


class TorchShard(Shard[SlotMapping]):
    """A span of a safetensors package.

    Weights are mapped from their files; each variant packs its own from there. The reference is available, but not
    loaded, unless nothing else can serve the architecture.
    """

    def __init__(
        self,
        source: ShardSource,
        blocks: BlockRange,
        options: EngineOptions,
        *,
        capture_on: Callable[[torch.device], Capture | None] = capture_on,
    ) -> None:
        super().__init__()
        started_s = time.perf_counter()
        self._device = torch.device(options.device)
        described = describe(source.config)
        options = _without_reserve(options, source, is_last=blocks.end == described.config.num_hidden_layers)
        self._refusal = refusal(described)
        dtype, place = (torch.float32, self._device) if self._refusal else (None, torch.device(CPU))
        span = load_span(source, blocks, dtype, place, options.memory_bytes, described)
        self._span = span
        self._reference = Reference(span if self._refusal else span.with_own_modules(), source, blocks, self._device)
        kv_blocks = self._reference.load() if self._refusal else empty_kv_blocks(span, self._device)
        kv_bytes_per_position = sum(block.bytes_per_position for block in kv_blocks)
        memory_bytes = _memory_bytes(options, span, self._device, is_loaded=self._refusal is not None)
        position_bytes = kv_bytes_per_position + (4 * span.hidden_size if options.plan_rows else 0)
        max_positions = min(span.max_positions or MAX_POSITIONS, MAX_POSITIONS)
        packed_bytes = 0 if self._refusal else _packed_bytes(span, self._device)
        kv_positions = _kv_positions(
            options, memory_bytes, span.weight_bytes, packed_bytes, position_bytes, max_positions
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
            device=options.device,
            narrow_kv=options.narrow_kv,
        )
        self._packed_bytes = memory_bytes - kv_positions * position_bytes
        """Limit of all variants' weights."""
        self._kv = KvCache([block.resized(kv_positions) for block in kv_blocks])
        self._narrow_kv = self._kv.narrow() if options.narrow_kv and not self._refusal else self._kv
        self._context = BackendContext(
            span,
            self._device,
            _embedding_on(self._device, span) if span.is_first and self._refusal is None else None,
            f"{source.model}-{blocks.start}-{blocks.end}",
            torch.get_num_threads(),
            None if options.cache_dir is None else FolderCache(options.cache_dir),
            capture_on(self._device),
        )
        self._backends: dict[str, Backend] = {}
        self._runners: dict[Variant, SpanRunner] = {}
        """But for the reference."""
        self._taken_bytes: dict[tuple[str, ...], int] = {}
        """By engine and packing: variants of the same share their weights."""

    def variants(self) -> frozenset[Variant]:
        """Return the variants that are available; all but the reference are loaded."""
        return frozenset({REFERENCE, *self._runners})

    def prepare(self, variant: Variant) -> None:
        """Build a variant and warm it; may run beside `step` in a thread of its own, one at a time.

        Raises EngineError where it is unavailable: no such variant, not for this architecture, or too little memory.
        """
        if variant in self._runners:
            return
        try:
            if variant == REFERENCE:
                self._load_reference()
            else:
                self._build(variant)
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)
            gc.collect()  # what was built so far may hold its own parts in cycles, with the memory of a GPU
            if isinstance(error, torch.OutOfMemoryError):
                raise NoVariantMemory(f"{variant} takes more memory than {self._device} has left") from None
            raise

    def _build(self, variant: Variant) -> None:
        spec = BACKENDS.get(variant.engine)
        packing = spec.packings.get(variant.arithmetic) if spec else None
        if spec is None or packing is None or variant.kv != AUTO:
            raise EngineError(f"there is no variant {variant}")
        if self._refusal:
            raise EngineError(self._refusal)
        if not self._runs_here(spec):
            raise EngineError(f"{variant} calculates on the CPU, and this span lies on {self._device}")
        needed = int(self._span.element_count * spec.element_bytes(packing, self._span.dtype.itemsize))
        shared = self._weights_of(variant)
        if shared not in self._taken_bytes:
            self._check_memory(variant, needed)
        backend = self._backend(variant.engine)
        try:
            self._runners[variant] = backend.build(variant.arithmetic, self._kv_of(variant))
        except (EngineError, RuntimeError):
            if shared not in self._taken_bytes:
                backend.forget(variant.arithmetic)  # its weights were packed, and warming failed
            raise
        self._taken_bytes[shared] = needed
        trim_heap()

    def drop(self, variant: Variant) -> None:
        """Give up a variant, and its weights unless another one shares them."""
        if self._runners.pop(variant, None) is not None:
            shared = self._weights_of(variant)
            if all(self._weights_of(each) != shared for each in self._runners):
                del self._taken_bytes[shared]
                self._backends[variant.engine].forget(variant.arithmetic)
            gc.collect()  # runners may hold each other's parts in cycles
            trim_heap()

    def _weights_of(self, variant: Variant) -> tuple[str, ...]:
        """Return which packed weights a variant computes with."""
        spec = BACKENDS[variant.engine]
        packing = spec.held_packing(spec.packings[variant.arithmetic], as_bf16=self._context.as_bf16)
        return variant.engine, packing

    def _check_memory(self, variant: Variant, needed: int) -> None:
        free = self._packed_bytes - sum(self._taken_bytes.values())
        if needed > free:
            raise NoVariantMemory(f"{variant} takes {needed} bytes of memory, of which {max(0, free)} are left")

    def _load_reference(self) -> SpanRunner:
        runner = self._reference.runner
        if runner is None:
            self._check_memory(REFERENCE, self._reference.needed_bytes)
            self._reference.load()
            self._taken_bytes[REFERENCE] = self._reference.needed_bytes
            runner = self._reference.runner
        assert runner is not None
        return runner

    def unload_reference(self) -> None:
        """Give the reference's memory back until a session wants it, unless nothing else can serve the span."""
        if self._refusal is None:
            is_file_used = any(self._span.dtype in _SERVED_FROM_FILES.get(each, ()) for each in self._runners)
            self._reference.unload(keep_pages=is_file_used)
            self._taken_bytes.pop(REFERENCE, None)
            trim_heap()

    def start_threads(self, variant: Variant) -> None:
        """Start the threads that a variant's steps will need; see Backend. Raises EngineError."""
        if variant.engine in BACKENDS and self._runs_here(BACKENDS[variant.engine]):
            self._backend(variant.engine).start_threads()

    def _runs_here(self, spec: BackendSpec) -> bool:
        return self._device.type == "cpu" or not spec.cpu_only

    def _backend(self, engine: str) -> Backend:
        if engine not in self._backends:
            self._backends[engine] = BACKENDS[engine].open(self._context)
        return self._backends[engine]

    def run_alone(self, variant: Variant, rows: npt.NDArray[Any], *, draws: int) -> npt.NDArray[np.float32]:
        """Return hidden states of rows from position 0 on or, on a last span, logits after the last `draws` of them.

        For quality measurements, without sessions: it writes into any pages. `rows`: token ids i64 (rows,) on a
        first span, hidden states f32 (rows, hidden size) elsewhere.
        """
        page_positions = self.info.page_positions(variant)
        slots = SlotMapping(range(-(-len(rows) // page_positions)), page_positions)
        return self._compute(variant, self.info.blocks, [SessionRows(rows, slots, 0, draws)])[0]

    def _kv_of(self, variant: Variant) -> KvCache:
        """Return the KV memory in the type in which a variant holds keys and values."""
        return self._kv if self.info.page_positions(variant) == PAGE_POSITIONS else self._narrow_kv

    def _reserve(self, _variant: Variant, reservation: KvReservation) -> SlotMapping:
        self._kv.copy(reservation.copied, reservation.pages[: len(reservation.copied)])
        return SlotMapping(reservation.pages, reservation.page_positions)

    def _release(self, kv: SlotMapping) -> None:
        """Nothing to do: the allocator gives the pages to others, who write over them."""

    def _give_back(self, pages: Sequence[int]) -> None:
        self._kv.give_back(pages)

    def _parts(self, variant: Variant, numbers: Sequence[int]) -> Sequence[Sequence[int]]:
        # The reference computes sessions one by one anyway.
        return [[number] for number in numbers] if variant == REFERENCE else [numbers]

    def _is_lost(self, error: Exception) -> bool:
        return is_lost(error)

    def _compute(
        self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[SlotMapping]]
    ) -> Sequence[npt.NDArray[np.float32]]:
        return self._run_parts(variant, blocks, parts, embeds=False)

    def _embed(
        self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[SlotMapping]]
    ) -> Sequence[npt.NDArray[np.float32]]:
        return self._run_parts(variant, blocks, parts, embeds=True)

    def _run_parts(
        self, variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[SlotMapping]], *, embeds: bool
    ) -> Sequence[npt.NDArray[np.float32]]:
        run = range(blocks.start - self.info.blocks.start, blocks.end - self.info.blocks.start)
        runner = self._load_reference() if variant == REFERENCE else self._runners[variant]
        given = [Rows(torch.from_numpy(p.rows).to(self._device), p.kv, p.position, p.draws) for p in parts]
        computed = runner.run(given, self._kv_of(variant), run, embeds=embeds)
        synchronize(self._device)  # it may still be running, and fail
        return [output.float().cpu().numpy() for output in computed]


def open_torch_shard(source: ShardSource, blocks: BlockRange, options: EngineOptions) -> TorchShard:
    """Return a shard. Raises EngineError where it cannot be built, also for errors of a GPU and its driver."""
    try:
        return TorchShard(source, blocks, options)
    except torch.OutOfMemoryError:
        raise EngineError(f"{options.device} has too little memory left: see --memory") from None
    except RuntimeError as error:
        if options.device == CPU:
            raise
        raise EngineError(f"{options.device} failed: {one_line(error, 200)}") from None


def _without_reserve(options: EngineOptions, source: ShardSource, *, is_last: bool) -> EngineOptions:
    """Return options whose limit of memory leaves out what intermediate results take.

    On a GPU, where all of it is allocated at once. The default limit leaves a share that is larger.
    """
    if options.memory_bytes is None or options.device == CPU:
        return options
    left_bytes = options.memory_bytes - reserve_bytes(source.config, is_last=is_last)
    return replace(options, memory_bytes=max(0, left_bytes))


def _memory_bytes(options: EngineOptions, span: LoadedSpan, device: torch.device, *, is_loaded: bool) -> int:
    """Return the limit of memory, by default that of the weights and a share of what is free beside them.

    `is_loaded`: whether the device holds the weights; the pages of mapped files count as free.
    """
    if options.memory_bytes is not None:
        return options.memory_bytes
    free = max(0, free_bytes(device) - (0 if is_loaded or device.type == CPU else span.weight_bytes))
    return span.weight_bytes + int(free * FREE_MEMORY_SHARE)


def _embedding_on(device: torch.device, span: LoadedSpan) -> torch.Tensor:
    embedding: Any = span.model.get_input_embeddings()
    weight: torch.Tensor = embedding.weight
    return weight.to(device)


def _packed_bytes(span: LoadedSpan, device: torch.device) -> int:
    """Return what all variants together take on a device."""
    is_gpu = device.type != CPU
    element_bytes = sum(
        spec.element_bytes(packing, span.dtype.itemsize)
        for spec in BACKENDS.values()
        if not (is_gpu and spec.cpu_only)
        for packing in {spec.held_packing(each, as_bf16=is_gpu and span.is_bf16) for each in spec.packed_bytes}
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
