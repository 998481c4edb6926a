"""A row's result must not depend on the rows that are calculated with it, or batches and drafts would change texts."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from node.engine.llamacpp.context import ContextOptions, SequenceRows, SpanContext
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.shard import LLAMACPP
from node.engine.llamacpp.span_model import SpanModel
from tests.unit.engine.driving import InProcess, decode, session
from tests.unit.engine.llamacpp.architectures import VOCABULARY, Architecture, write_model
from tests.unit.engine.llamacpp.jobs import decode_drafted, decode_replayed, decode_together
from tests.unit.engine.llamacpp.packages import Alone, write_package

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 60).astype(np.int32)
WIDE = Architecture(
    "llama",
    {
        "attn_norm.weight": (256,),
        "attn_q.weight": (256, 256),
        "attn_k.weight": (64, 256),
        "attn_v.weight": (64, 256),
        "attn_output.weight": (256, 256),
        "ffn_norm.weight": (256,),
        "ffn_gate.weight": (512, 256),
        "ffn_up.weight": (512, 256),
        "ffn_down.weight": (256, 512),
    },
    {
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 32,
    },
    blocks=2,
)
"""Rows as wide as llama.cpp's fast kernels want them: narrow ones never reach those."""

INDEPENDENT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
"""The types of weights of which docs/models.md says so."""

NEAR_TIE = 0.04
"""Of the largest logit: twice what docs/models.md says of K-quants, as both logits may be off."""


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_row_does_not_depend_on_the_size_of_its_pass(tmp_path: Path, kind: str) -> None:
    model = SpanModel(load_library(), write_model(WIDE, tmp_path / "model.gguf", GGMLQuantizationType[kind]))
    together = None
    for threads in (1, 2):
        options = ContextOptions(first=True, last=True, block_count=2, positions=1024, sequences=9, threads=threads)
        context = SpanContext(model, options)
        whole = context.run([SequenceRows(0, 0, TOKENS, len(TOKENS))])[0]
        for sequence, rows in enumerate((1, 4, 12), start=1):
            parts = [_pass(context, sequence, first, rows) for first in range(0, len(TOKENS), rows)]
            assert np.array_equal(np.concatenate(parts), whole), f"passes of {rows} rows, {threads} threads"
        beside = context.run([SequenceRows(sequence, 0, TOKENS[:7], 7) for sequence in range(4, 9)])
        assert all(np.array_equal(logits, whole[:7]) for logits in beside), f"beside others, {threads} threads"
        assert together is None or np.array_equal(whole, together), "threads"
        together = whole


@pytest.mark.parametrize("kind", [*INDEPENDENT, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_row_does_not_depend_on_the_number_of_threads(tmp_path: Path, kind: str, rows: int) -> None:
    """Which is another from pass to pass (`ThreadTuner`)."""
    model = SpanModel(load_library(), write_model(WIDE, tmp_path / "model.gguf", GGMLQuantizationType[kind]))
    found = []
    for threads in (1, 2, 3):
        options = ContextOptions(first=True, last=True, block_count=2, positions=1024, sequences=2, threads=threads)
        context = SpanContext(model, options)
        found.append(np.concatenate([_pass(context, 0, first, rows) for first in range(0, len(TOKENS), rows)]))
    assert all(np.array_equal(each, found[0]) for each in found[1:])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
async def test_k_quants_are_exact_alone_and_up_to_near_ties_in_batches(tmp_path: Path, kind: str) -> None:
    """What Q4_K_M consists of. Of a text alone, its prompt in one pass, every span has the bits of the whole file."""
    path = write_model(WIDE, tmp_path / "model.gguf", GGMLQuantizationType[kind])
    files = write_package(path, tmp_path / "package")
    alone, texts = files.alone(), [TOKENS[: 9 + 7 * number].tolist() for number in range(8)]
    wanted = [alone.decode(text, 16) for text in texts]
    for cuts in ([], [1]):
        cut = [InProcess(shard) for shard in files.shards(cuts)]
        assert await decode(cut, texts[3], 16, variant=LLAMACPP) == wanted[3]
        together = await decode_together(cut, texts, 16)
        drafted = await decode_drafted(cut, session(8), texts[4], wanted[4], may_differ=True)
        replayed = await decode_replayed(cut, session(9), texts[5], 16)
        for number, found in [*enumerate(together), (4, drafted), (5, replayed)]:
            _check_tie(alone, texts[number], wanted[number], found)


def _check_tie(alone: Alone, prompt: list[int], wanted: list[int], found: list[int]) -> None:
    """Check that texts part, if they do, where two tokens are nearly as likely."""
    place = next((each for each in range(len(wanted)) if wanted[each] != found[each]), None)
    if place is not None:
        logits = alone.logits([*prompt, *wanted[:place]])[-1]
        assert logits[wanted[place]] - logits[found[place]] < NEAR_TIE * np.abs(logits).max()


def _pass(context: SpanContext, sequence: int, first: int, rows: int) -> NDArray[np.float32]:
    return context.run([SequenceRows(sequence, first, TOKENS[first : first + rows], rows)])[0]
