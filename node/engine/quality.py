"""Measures the quality of lossy methods: `python -m node.engine.quality PACKAGE_DIR`.

A process of its own, at low priority. On stdin comes one JSON document, `{"windows": [[token, …], …], "lineages":
["variant/activations", …]}`, which are KV keys; on stdout goes one, `{KV key: {"greedy_agreement", "mean_kl",
"perplexity_change"} or null}`, null where it is unavailable for this model.

The text passes through the model part by part, so memory holds one part and not the model: a machine that serves a few
blocks can judge the whole. Between the parts rows are encoded and decoded by the wire codec, as between the stages of a
route; there are at least PARTS.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from node.engine.activation_codec import decode_rows, encode_rows
from node.engine.interface import (
    PAGE_POSITIONS,
    EngineError,
    EngineOptions,
    KvCompatibilityKey,
    ShardSource,
    Variant,
    reference_variant,
    source_from_package,
)
from node.engine.open_shard import open_shard
from node.engine.shard import Shard
from node.models.manifest import MANIFEST_FILE, parse_manifest
from node.models.store import Package
from node.util.parent import end_with_parent
from node.util.priority import SLEEPING_THREADS, yield_to_others
from protocol.identity import BlockRange
from selector.cuts import Cuts

PARTS: Final = 4
"""As on a route of four stages: rows are quantised three times on their way."""

PART_BYTES: Final = 2 << 30
"""Approximate size of a part's weights, where a single block is not larger."""

_EXACT_WIRE = "fp32"


@dataclass(frozen=True, slots=True)
class Quality:
    """Deviation from the reference, over all positions of the text but the first of each window.

    `greedy_agreement`: share of positions, 0 to 1, with the same likeliest token. `mean_kl`: mean KL(reference || it)
    in nats. `perplexity_change`: relative change of the text's perplexity; 0.01 is one per cent more.
    """

    greedy_agreement: float
    mean_kl: float
    perplexity_change: float


def measure_quality(
    parts: Sequence[tuple[BlockRange, ShardSource]],
    windows: Sequence[Sequence[int]],
    kv_keys: Sequence[KvCompatibilityKey],
) -> Mapping[KvCompatibilityKey, Quality | None]:
    """Return the quality of each KV key; None where it is unavailable.

    `parts`: consecutive spans that are the whole model. `windows`: token ids, at least two in each, read
    independently. Raises EngineError where the model itself cannot be served.
    """
    positions = -(-max(map(len, windows)) // PAGE_POSITIONS) * PAGE_POSITIONS
    reference = KvCompatibilityKey(reference_variant(parts[0][1].format), _EXACT_WIRE)
    texts = [np.array(window, np.int64) for window in windows]
    rows: dict[KvCompatibilityKey, list[npt.NDArray[Any]]] = {kv_key: list(texts) for kv_key in (reference, *kv_keys)}
    for blocks, source in parts:
        shard = open_shard(source, blocks, EngineOptions(kv_positions=positions, narrow_kv=True))
        for kv_key in list(rows):
            try:
                shard.prepare(kv_key.variant)
            except EngineError:
                if kv_key == reference:
                    raise
                del rows[kv_key]
        if shard.info.is_last:
            found = _compare(shard, rows, reference, texts, kv_keys)
            return {kv_key: found.get(kv_key) for kv_key in kv_keys}
        for kv_key, given in rows.items():
            states = (shard.run_alone(kv_key.variant, window, draws=0) for window in given)
            rows[kv_key] = [decode_rows(encode_rows(window, kv_key.activations)) for window in states]
    raise EngineError("the parts are not the whole model")


def _compare(
    shard: Shard[Any],
    rows: Mapping[KvCompatibilityKey, Sequence[npt.NDArray[Any]]],
    reference: KvCompatibilityKey,
    texts: Sequence[npt.NDArray[np.int64]],
    wanted: Sequence[KvCompatibilityKey],
) -> dict[KvCompatibilityKey, Quality]:
    """Run the last part, a window at a time, so that the distributions of one are in memory at once.

    The reference runs twice where it is wanted, too: its figures show whether it is reproducible.
    """
    sums = {kv_key: np.zeros(3) for kv_key in rows}
    count = 0
    for number, text in enumerate(texts):

        def distribution(kv_key: KvCompatibilityKey, number: int = number) -> npt.NDArray[np.float32]:
            given = rows[kv_key][number]
            return _log_softmax(shard.run_alone(kv_key.variant, given, draws=len(given))[:-1])

        following = text[1:, None]
        right = distribution(reference)
        count += len(following)
        for kv_key, sum_ in sums.items():
            other = distribution(kv_key) if kv_key in wanted else right
            sum_ += (
                (other.argmax(axis=-1) == right.argmax(axis=-1)).sum(),
                (np.exp(right) * (right - other)).sum(dtype=np.float64),
                -np.take_along_axis(other, following, axis=-1).sum(dtype=np.float64),
            )
    means = {kv_key: (sum_ / count).tolist() for kv_key, sum_ in sums.items()}
    loss = means[reference][2]
    return {kv_key: Quality(agreed, kl, math.expm1(other - loss)) for kv_key, (agreed, kl, other) in means.items()}


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted: npt.NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def split_into_parts(block_bytes: Sequence[int], granularity: int = 1) -> Iterator[BlockRange]:
    """Yield the parts of a model with blocks of these sizes, as equal as can be where it may be cut."""
    cuts = Cuts(len(block_bytes), granularity)
    parts = min(cuts.unit_count, max(PARTS, -(-sum(block_bytes) // PART_BYTES)))
    edges = [cuts.unit_count * edge // parts for edge in range(parts + 1)]
    yield from (cuts.blocks_of(BlockRange(start, end)) for start, end in pairwise(edges))


def kv_key_of(name: str) -> KvCompatibilityKey:
    """Return the KV key with this name."""
    *variant, activations = name.split("/")
    return KvCompatibilityKey(Variant(*variant), activations)


def main() -> int:
    """Measure the request on stdin, and print the result; return the exit code."""
    yield_to_others()
    os.environ.update(SLEEPING_THREADS)  # OpenMP reads them when an engine loads it
    end_with_parent()
    asked = json.load(sys.stdin)
    folder = Path(sys.argv[1])
    package = Package(parse_manifest((folder / MANIFEST_FILE).read_bytes()), folder)
    parts = [
        (blocks, source_from_package(package, blocks))
        for blocks in split_into_parts(
            [file.size_bytes for file in package.manifest.blocks], package.manifest.granularity
        )
    ]
    try:
        found = measure_quality(parts, asked["windows"], [kv_key_of(name) for name in asked["lineages"]])
    except EngineError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    json.dump({str(kv_key): asdict(each) if each else None for kv_key, each in found.items()}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
