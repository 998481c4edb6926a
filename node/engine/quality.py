"""Measures what lossy methods do to a model's answers: `python -m node.engine.quality PACKAGE_DIR`.

A process of its own, at low priority. On stdin comes one JSON document, `{"windows": [[token, …], …], "lineages":
["engine/arithmetic/activations", …]}`; on stdout goes one, `{lineage: {"greedy_agreement", "mean_kl",
"perplexity_change"} or null}`, null for what cannot be had for this model.

The model passes through a part at a time, and all the text through each part, so memory holds one part and not the
model: a machine that serves a few blocks can judge the whole. Between the parts rows are put into the codec of the wire
and out again, as between the stages of a route; there are at least PARTS.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from node.engine.engine_config import EngineOptions, ShardSource
from node.engine.interface import PAGE_POSITIONS, REFERENCE, EngineError, Lineage, Variant
from node.util.priority import yield_to_others
from protocol.identity import BlockRange

if TYPE_CHECKING:
    import torch

    from node.engine.shard import Shard

PARTS: Final = 4
"""As on a route of four stages: rows are quantised three times on their way."""

PART_BYTES: Final = 2 << 30
"""Of weights in one part, about, where a block is not more by itself."""

_EXACT_WIRE = "fp32"


@dataclass(frozen=True, slots=True)
class Quality:
    """How far a lineage strays from the reference, over all positions of the text but the first of each window.

    `greedy_agreement`: share of positions, 0 to 1, where the likeliest token is the same. `mean_kl`: mean divergence of
    its distribution from the reference's, KL(reference || lineage), in nats. `perplexity_change`: relative change of
    the text's perplexity; 0.01 is one per cent more.
    """

    greedy_agreement: float
    mean_kl: float
    perplexity_change: float


def measure_quality(
    parts: Sequence[tuple[BlockRange, ShardSource]], windows: Sequence[Sequence[int]], lineages: Sequence[Lineage]
) -> Mapping[Lineage, Quality | None]:
    """Return the quality of each lineage; None for one that cannot be had.

    `parts`: consecutive spans that are the whole model. `windows`: token ids, at least two in each, that are read
    apart from one another. Raises EngineError where the model itself cannot be served.
    """
    import torch

    from node.engine.shard import Shard

    positions = -(-max(map(len, windows)) // PAGE_POSITIONS) * PAGE_POSITIONS
    reference = Lineage(REFERENCE, _EXACT_WIRE)
    texts = [torch.tensor(window) for window in windows]
    rows: dict[Lineage, list[torch.Tensor]] = {lineage: list(texts) for lineage in (reference, *lineages)}
    for blocks, source in parts:
        shard = Shard(source, blocks, EngineOptions(kv_positions=positions))
        for lineage in list(rows):
            try:
                shard.prepare(lineage.variant)
            except EngineError:
                if lineage == reference:
                    raise
                del rows[lineage]
        if shard.info.is_last:
            return dict.fromkeys(lineages) | _compare(shard, rows, reference, texts)
        rows = {lineage: [_pass(shard, lineage, window) for window in given] for lineage, given in rows.items()}
    raise EngineError("the parts are not the whole model")


def _pass(shard: "Shard", lineage: Lineage, rows: "torch.Tensor") -> "torch.Tensor":
    """Return rows as the next part sees them."""
    import torch

    from node.engine.activation_codec import decode_rows, encode_rows

    hidden = shard.run_alone(lineage.variant, rows, draws=0)
    return torch.from_numpy(decode_rows(encode_rows(hidden.cpu().numpy(), lineage.activations)))


def _compare(
    shard: "Shard",
    rows: Mapping[Lineage, Sequence["torch.Tensor"]],
    reference: Lineage,
    texts: Sequence["torch.Tensor"],
) -> dict[Lineage, Quality | None]:
    """Run the last part, a window at a time, so that the distributions of one are in memory at once."""
    import torch

    sums = {lineage: torch.zeros(3, dtype=torch.float64) for lineage in rows}
    count = 0
    for number, text in enumerate(texts):

        def distribution(lineage: Lineage, number: int = number) -> torch.Tensor:
            given = rows[lineage][number]
            logits = shard.run_alone(lineage.variant, given, draws=len(given))
            return torch.log_softmax(logits[:-1].float(), dim=-1)

        following = text[1:, None]
        right = distribution(reference)
        count += len(following)
        for lineage, sum_ in sums.items():
            other = right if lineage == reference else distribution(lineage)
            sum_[0] += (other.argmax(dim=-1) == right.argmax(dim=-1)).sum()
            sum_[1] += (right.exp() * (right - other)).sum(dtype=torch.float64)
            sum_[2] -= other.gather(1, following).sum(dtype=torch.float64)
    means = {lineage: (sum_ / count).tolist() for lineage, sum_ in sums.items()}
    loss = means[reference][2]
    return {
        lineage: Quality(agreed, kl, float(torch.tensor(other - loss, dtype=torch.float64).expm1()))
        for lineage, (agreed, kl, other) in means.items()
        if lineage != reference
    }


def cut(block_bytes: Sequence[int]) -> Iterator[BlockRange]:
    """Yield the parts of a model with blocks of these sizes, as equal as can be."""
    count = len(block_bytes)
    parts = min(count, max(PARTS, -(-sum(block_bytes) // PART_BYTES)))
    edges = [count * edge // parts for edge in range(parts + 1)]
    yield from (BlockRange(start, end) for start, end in pairwise(edges))


def lineage_of(name: str) -> Lineage:
    """Return the lineage with this name."""
    engine, arithmetic, activations = name.split("/")
    return Lineage(Variant(engine, arithmetic), activations)


def main() -> int:
    """Measure what stdin asks for, and print it; return the exit code."""
    from node.engine.client import source_from_package
    from node.models.manifest import MANIFEST_FILE, parse_manifest
    from node.models.store import Package

    yield_to_others()
    asked = json.load(sys.stdin)
    folder = Path(sys.argv[1])
    package = Package(parse_manifest((folder / MANIFEST_FILE).read_bytes()), folder)
    parts = [
        (blocks, source_from_package(package, blocks))
        for blocks in cut([file.size_bytes for file in package.manifest.blocks])
    ]
    try:
        found = measure_quality(parts, asked["windows"], [lineage_of(name) for name in asked["lineages"]])
    except EngineError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    json.dump({str(lineage): asdict(each) if each else None for lineage, each in found.items()}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
