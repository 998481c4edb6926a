"""Admission of spans: the memory plan of a span, beside the replay buffers that its stage keeps."""

from collections.abc import Sequence

from node.engine.device import CPU
from node.engine.engine_costs import engine_costs
from node.engine.memory_plan import ModelSizes, fitting_span, longest_spans, mebibytes, memory_plan
from node.models.manifest import Manifest
from node.stages.replay_buffer import REPLAY_BYTES, REPLAY_SHARE, replay_bytes_of
from protocol.identity import BlockRange

_MEBIBYTE = 1 << 20


def engine_bytes_of(span_bytes: int, device: str = CPU) -> int:
    """Return what the engine has of a span's memory: replay buffers lie in main memory, whatever computes."""
    return span_bytes - (replay_bytes_of(span_bytes) if device == CPU else 0)


def span_bytes_for(manifest: Manifest, blocks: BlockRange, device: str = CPU) -> int:
    """Return the least memory with which a span is admitted, in whole MiB: what `--memory` has to give it."""
    total = memory_plan(ModelSizes.of_manifest(manifest), blocks, engine_costs(manifest)).total_bytes
    if device == CPU:
        total = min(int(total / (1 - REPLAY_SHARE)) + 1, total + REPLAY_BYTES)
    return -(-total // _MEBIBYTE) * _MEBIBYTE


def node_bytes_for(manifest: Manifest, spans: Sequence[BlockRange], device: str = CPU) -> int:
    """Return the least `--memory` of a node that serves these spans, each of which has the same share of it."""
    return len(spans) * max(span_bytes_for(manifest, blocks, device) for blocks in spans)


def longest_in(manifest: Manifest, span_bytes: int, device: str = CPU) -> Sequence[int]:
    """Return for each unit of a model how many units from it on are admitted to a span's memory."""
    return longest_spans(ModelSizes.of_manifest(manifest), engine_bytes_of(span_bytes, device), engine_costs(manifest))


def shortage(manifest: Manifest, blocks: BlockRange, span_bytes: int, device: str = CPU) -> str | None:
    """Return why a span is refused: how much memory is missing, and which of its blocks fit. None where it is not."""
    model, costs, engine_bytes = (
        ModelSizes.of_manifest(manifest),
        engine_costs(manifest),
        engine_bytes_of(span_bytes, device),
    )
    plan = memory_plan(model, blocks, costs)
    if plan.total_bytes <= engine_bytes:
        return None
    needed = span_bytes_for(manifest, blocks, device)
    fitting = fitting_span(model, blocks, engine_bytes, costs)
    units = manifest.cuts.units_of(blocks)
    if fitting:
        instead = f"; blocks {fitting} would fit"
    else:  # of one unit it goes without saying
        instead = "" if units and len(units) == 1 else "; not even one block would fit"
    return (
        f"it needs {mebibytes(needed)} of memory ({plan}, and replay buffers), {mebibytes(needed - span_bytes)} more "
        f"than it has: see --memory{instead}"
    )


def smallest_span(manifest: Manifest, device: str = CPU) -> BlockRange:
    """Return the span of one unit that takes the least memory."""
    units = (BlockRange(number, number + 1) for number in range(manifest.cuts.unit_count))
    return min(map(manifest.cuts.blocks_of, units), key=lambda blocks: span_bytes_for(manifest, blocks, device))
