"""What lossy arithmetic does to answers, measured a part of the model at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from node.engine.backends import linear
from node.engine.backends.linear import ARITHMETICS, pack
from node.engine.interface import PAGE_POSITIONS, REFERENCE, EngineOptions, KvCompatibilityKey, Variant
from node.engine.kv_cache import SlotMapping
from node.engine.quality import PARTS, kv_key_of, measure_quality, split_into_parts
from node.engine.shard import SessionRows
from node.engine.torch_shard import TorchShard
from protocol.identity import BlockRange
from tests.unit.engine.tiny_models import BLOCKS, VOCABULARY, TinyModel

WHOLE = BlockRange(0, BLOCKS)
EXACT = KvCompatibilityKey(Variant("fused", "fp32"), "fp32")
BF16 = KvCompatibilityKey(Variant("fused", "bf16"), "fp32")
BF16_WIRE = KvCompatibilityKey(Variant("fused", "fp32"), "bf16")


def windows(length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (3, length), generator=generator).tolist()


def test_quality_is_zero_for_exact_and_ordered_for_lossy_variants(make_tiny_model: Callable[[str], TinyModel]) -> None:
    model = make_tiny_model("llama")
    parts = [(blocks, model.source(blocks)) for blocks in split_into_parts([1] * BLOCKS)]
    assert len(parts) == min(PARTS, BLOCKS)
    found = measure_quality(
        parts, windows(), [EXACT, BF16, BF16_WIRE, KvCompatibilityKey(Variant("fused", "steam"), "fp32")]
    )
    exact, bf16, wire = found[EXACT], found[BF16], found[BF16_WIRE]
    assert exact is not None
    assert bf16 is not None
    assert wire is not None
    assert exact.greedy_agreement == 1.0
    assert abs(exact.perplexity_change) < 1e-4 > exact.mean_kl
    assert exact.mean_kl < bf16.mean_kl < 0.1
    assert exact.mean_kl < wire.mean_kl < 0.1
    assert abs(bf16.perplexity_change) < 0.1
    assert found[KvCompatibilityKey(Variant("fused", "steam"), "fp32")] is None


def test_the_figures_are_those_of_the_whole_model_at_once(make_tiny_model: Callable[[str], TinyModel]) -> None:
    model = make_tiny_model("llama")
    texts = windows()
    found = measure_quality([(WHOLE, model.source(WHOLE))], texts, [BF16])[BF16]
    shard = TorchShard(model.source(WHOLE), WHOLE, EngineOptions(kv_positions=2 * PAGE_POSITIONS, narrow_kv=True))
    shard.prepare(BF16.variant)

    def logits(variant: Variant) -> torch.Tensor:
        rows = [shard.run_alone(variant, np.array(text), draws=len(text))[:-1].copy() for text in texts]
        return torch.log_softmax(torch.from_numpy(np.concatenate(rows)).double(), dim=-1)

    right, other = logits(Variant("eager", "fp32")), logits(BF16.variant)
    following = torch.tensor([token for text in texts for token in text[1:]])[:, None]
    change = (right.gather(1, following) - other.gather(1, following)).mean().exp() - 1
    assert found is not None
    assert found.greedy_agreement == pytest.approx((right.argmax(-1) == other.argmax(-1)).double().mean().item())
    assert found.mean_kl == pytest.approx((right.exp() * (right - other)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    assert found.perplexity_change == pytest.approx(change.item(), abs=1e-5)


@pytest.mark.parametrize("arithmetic", ["bf16", "int8", "w8a8"])
def test_products_round_alike_for_few_and_many_rows(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_FAST_BF16", False)
    generator = torch.Generator().manual_seed(3)
    rows, matrix = (torch.randn(shape, generator=generator) for shape in ((40, 64), (48, 64)))
    packing, product = ARITHMETICS[arithmetic]
    packed = pack(packing, [matrix], None, torch.device("cpu"))
    many, few = product(rows, packed), torch.cat([product(part, packed) for part in rows.split(8)])
    weights = packed.matrix.double() * (1 if packed.scale is None else packed.scale.double().unsqueeze(1))
    rounding = (few - rows.double() @ weights.t()).abs().mean()
    assert (many - few).abs().mean() < 0.1 * rounding


def test_figures_are_those_of_decoding(
    make_tiny_model: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_FAST_BF16", False)
    model, [text, *_] = make_tiny_model("llama"), windows()
    found = measure_quality([(WHOLE, model.source(WHOLE))], [text], [BF16])[BF16]
    shard = TorchShard(model.source(WHOLE), WHOLE, EngineOptions(kv_positions=2 * PAGE_POSITIONS, narrow_kv=True))
    shard.prepare(BF16.variant)
    slots = SlotMapping([0], shard.info.page_positions(BF16.variant))
    steps = [SessionRows(np.array([token]), slots, position, 1) for position, token in enumerate(text)]
    decoded = np.concatenate([shard._compute(BF16.variant, WHOLE, [rows])[0].copy() for rows in steps])
    right, other = (
        torch.log_softmax(torch.from_numpy(logits[:-1]).double(), dim=-1)
        for logits in (shard.run_alone(REFERENCE, np.array(text), draws=len(text)), decoded)
    )
    assert found is not None
    assert found.mean_kl == pytest.approx((right.exp() * (right - other)).sum(-1).mean().item(), rel=0.2)


def test_a_large_model_is_cut_into_more_parts() -> None:
    assert [len(part) for part in split_into_parts([10] * 30)] == [7, 8, 7, 8]
    assert [len(part) for part in split_into_parts([1 << 30] * 10)] == [2] * 5
    assert [len(part) for part in split_into_parts([3 << 30] * 2)] == [1, 1]
    assert [len(part) for part in split_into_parts([10] * 26, 6)] == [6, 6, 6, 8]
    assert kv_key_of(str(BF16_WIRE)) == BF16_WIRE
