"""What a span takes of memory beside its weights and its KV cache."""

from pathlib import Path

import numpy as np
import pytest

from node.engine.llamacpp.context import ContextOptions, SequenceRows, SpanContext
from node.engine.llamacpp.library import load_library
from node.engine.llamacpp.span_model import SpanModel
from tests.unit.engine.llamacpp.packages import Alone, GgufFiles

MIB = 1 << 20


def dirty_bytes() -> int:
    """Return what this process has written to, and shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what is resident")
def test_logits_of_sequences_that_are_not_there_take_no_memory(smol: GgufFiles, smol_alone: Alone) -> None:
    model = SpanModel(load_library(), smol.model.paths[0])
    before = dirty_bytes()
    options = ContextOptions(first=True, last=True, block_count=30, positions=8192, sequences=250, threads=1)
    context = SpanContext(model, options)
    logits_bytes = options.sequences * smol.vocabulary_size * 4
    assert logits_bytes > 45 * MIB
    assert dirty_bytes() - before < 25 * MIB  # KV cache of 768 positions: 17 MiB
    rows = np.array([504, 913, 4834], np.int32)
    assert np.array_equal(context.run([SequenceRows(0, 0, rows, 1)])[0], smol_alone.logits(rows.tolist()))
