"""Which devices of this node serve which spans: with several GPUs, a worker each and a span each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from node.config import MEMORY_SHARE
from node.engine.device import CPU, Device, cpu_device, llamacpp_has_gpu
from node.models.layout import GGUF
from node.models.manifest import Manifest
from node.stages.memory_admission import longest_in, span_bytes_for
from protocol.identity import BlockRange


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """The memory that a span has on a device. `device`: torch's name of it."""

    device: str
    memory_bytes: int


def shares_of_spans(
    devices: Sequence[Device], memory_bytes: Sequence[int], spans: int, *, draft: bool = False
) -> Sequence[Sequence[DeviceShare]]:
    """Return the shares of each of a node's spans, and of its draft model behind them, which has one device.

    Where there are at least as many spans as devices, they are dealt out, and those on one device have equal shares of
    its memory. Where there are fewer, the devices are dealt out, and a span with several is split over them.
    """
    count = spans + draft
    if count < len(devices):
        whole = [DeviceShare(each.name, size) for each, size in zip(devices, memory_bytes, strict=True)]
        of_draft = [(whole.pop(),)] if draft else []
        return [*(tuple(whole[number::spans]) for number in range(spans)), *of_draft]
    shares: list[Sequence[DeviceShare]] = []
    for number in range(count):
        place = number % len(devices)
        on_it = len(range(place, count, len(devices)))
        shares.append((DeviceShare(devices[place].name, memory_bytes[place] // on_it),))
    return shares


def cpu_bytes_of_each(memory_bytes: int | None, count: int) -> int:
    """Return what each of so many spans has of main memory, which is limited to `memory_bytes` if that is given."""
    return (memory_bytes or int(cpu_device().free_bytes * MEMORY_SHARE)) // max(count, 1)


def usable_shares(manifest: Manifest, shares: Sequence[DeviceShare], cpu_bytes: int) -> Sequence[DeviceShare]:
    """Return the shares with a worker each; `cpu_bytes`: what a span would have of main memory.

    A GGUF package is computed on the CPU, whatever torch uses, where the build of llama.cpp knows no GPU.
    """
    if manifest.format != GGUF or shares[0].device == CPU or llamacpp_has_gpu():
        return shares
    return (DeviceShare(CPU, cpu_bytes),)


def share_beside(share: DeviceShare, free_bytes: int) -> DeviceShare:
    """Return the share of new blocks beside those that a device holds now, with so much memory free.

    A GPU's memory is allocated at once, with all keys and values: there the new blocks have what the old ones leave,
    but for what these take in their steps.
    """
    if share.device == CPU:
        return share
    return replace(share, memory_bytes=max(1, min(share.memory_bytes, int(free_bytes * MEMORY_SHARE))))


def split_over(manifest: Manifest, blocks: BlockRange, shares: Sequence[DeviceShare]) -> Sequence[BlockRange]:
    """Return the part of a span for each share, in order, so that the fullest is as empty as the model's cuts allow.

    There are fewer parts than shares where the span has fewer units. With several shares it takes up to a second.
    """
    units = manifest.cuts.units_of(blocks)
    if len(shares) == 1 or units is None:
        return (blocks,)

    @cache
    def needed_bytes(start: int, end: int) -> int:
        return span_bytes_for(manifest, manifest.cuts.blocks_of(BlockRange(start, end)), shares[0].device)

    # By where the parts so far end: how full the fullest share is, and where each part ends.
    best: dict[int, tuple[float, tuple[int, ...]]] = {units.start: (0.0, ())}
    for share in shares[: len(units)]:
        ways: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        for start, (fullest, ends) in best.items():
            for end in range(start + 1, units.end + 1):
                filled = max(fullest, needed_bytes(start, end) / share.memory_bytes)
                ways.setdefault(end, []).append((filled, (*ends, end)))
        best = {end: min(found) for end, found in ways.items()}
    return [manifest.cuts.blocks_of(BlockRange(*edges)) for edges in pairwise((units.start, *best[units.end][1]))]


def longest_over(manifest: Manifest, shares: Sequence[DeviceShare]) -> Sequence[int]:
    """Return for each unit of a model how many units from it on fit into the shares together."""
    longest = [longest_in(manifest, share.memory_bytes, share.device) for share in shares]
    counts = []
    for start in range(manifest.cuts.unit_count):
        end = start
        for each in longest:
            end += each[end] if end < manifest.cuts.unit_count else 0
        counts.append(end - start)
    return counts
