"""What engines do on a GPU, computed on whatever these tests run on: the same tokens, with less memory and launches.

What stands in for CUDA graphs records the operations of a step and repeats them, so that whatever a step reads that is
not in its buffers stays as it was.
"""

import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from node.engine import widened
from node.engine.backends import batched, linear
from node.engine.backends import torch as torch_backend
from node.engine.backends.decode_graphs import CudaCapture
from node.engine.backends.flash_attention import flash_attention_on, is_attention
from node.engine.backends.interface import BackendContext, Capture, Rows, Step
from node.engine.backends.linear import GPU_ARITHMETICS, pack
from node.engine.backends.paged_attention import AttentionView, joint_groups, views_on_cpu, views_on_gpu
from node.engine.backends.transformers import TransformersSpan
from node.engine.interface import (
    PAGE_POSITIONS,
    EngineError,
    EngineFull,
    EngineOptions,
    NoVariantMemory,
    SessionOptions,
    SliceInput,
    Variant,
)
from node.engine.kv_cache import BlockKvCache, SlotMapping
from node.engine.loading import load_span
from node.engine.memory_plan import reserve_bytes
from node.engine.torch_shard import TorchShard
from node.engine.widened import multiply_pieces
from protocol.identity import BlockRange
from protocol.tensors import tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import DEVICE, GREEDY, InProcess, decode, memory_for, pages_of, session, spans
from tests.unit.engine.tiny_models import BLOCKS, COUNT, PROMPT, TinyModel, narrowed

MakeTinyModel = Callable[[str], TinyModel]
WHOLE = BlockRange(0, BLOCKS)
OPTIONS = EngineOptions(kv_positions=512, device=DEVICE)
NARROW = replace(OPTIONS, narrow_kv=True)
FUSED, BF16 = Variant("fused", "fp32"), Variant("fused", "bf16")
gpu_only = pytest.mark.skipif(not DEVICE.startswith("cuda"), reason="needs a GPU: make gpu")
FAMILIES = ["llama", "qwen2, sliding from block 2", "qwen3", "mistral"]


class Recorder:
    """Records the operations of steps, as CUDA graphs do; `sizes`: of what was recorded, `replays`: how often."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def __call__(self, step: Step) -> Step:
        self.recorded += 1
        graph = make_fx(step)()

        def replay() -> torch.Tensor:
            self.replays += 1
            output: torch.Tensor = graph()
            return output

        return replay


def recording(tiny: TinyModel, count: int, capture: Capture, options: EngineOptions = OPTIONS) -> list[InProcess]:
    shards = [
        TorchShard(tiny.source(blocks), blocks, options, capture_on=lambda _device: capture)
        for blocks in spans(BLOCKS, count)
    ]
    for shard in shards:
        shard.prepare(FUSED)
    return [InProcess(shard) for shard in shards]


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 1), ("llama, tied", 2), ("qwen2, sliding from block 2", 1), ("qwen3", 2)]
)
async def test_recorded_steps_give_the_tokens_of_generate(
    family: str, count: int, make_tiny_model: MakeTinyModel
) -> None:
    tiny, recorder = make_tiny_model(family), Recorder()
    engines = recording(tiny, count, recorder)
    assert await decode(engines, PROMPT, 12, variant=FUSED) == tiny.tokens[:12]
    assert recorder.recorded == count
    assert recorder.replays == count * 11, "only the prompt is not replayed"


async def test_batches_of_any_size_are_padded_to_recorded_ones(make_tiny_model: MakeTinyModel) -> None:
    tiny, recorder = make_tiny_model("mistral"), Recorder()
    engine = recording(tiny, 1, recorder, replace(OPTIONS, kv_positions=2048))[0]
    chance = random.Random(1)
    for number in range(64):  # and close every second one, so that pages are not contiguous
        await engine.open(session(1000 + number), PAGE_POSITIONS)
    for number in range(0, 64, 2):
        await engine.close(session(1000 + number))
    texts = [[chance.randrange(97) for _ in range(length)] for length in (3, 30, 40)]
    reference = InProcess(TorchShard(tiny.source(WHOLE), WHOLE, OPTIONS))
    expected = [await decode([reference], text, 5) for text in texts]
    drawn: list[list[int]] = [[] for _ in texts]
    for number, text in enumerate(texts):
        engine.open_now(session(number), len(text) + 5, SessionOptions(sampling=GREEDY, variant=FUSED))
        rows = SliceInput(session=session(number), position=0, tensor=tensor_from_tokens(text), draws=1)
        drawn[number] += tokens_from_tensor(engine.step_now([rows]).outputs[0].tensor)
    while waiting := [number for number, tokens in enumerate(drawn) if len(tokens) < 5]:
        chosen = chance.sample(waiting, chance.randrange(1, len(waiting) + 1))
        slices = [
            SliceInput(
                session=session(number),
                position=len(texts[number]) + len(drawn[number]) - 1,
                tensor=tensor_from_tokens(drawn[number][-1:]),
                draws=1,
            )
            for number in chosen
        ]
        for number, output in zip(chosen, engine.step_now(slices).outputs, strict=True):
            drawn[number] += tokens_from_tensor(output.tensor)
    assert drawn == expected
    assert 1 < recorder.recorded <= 6, "1, 2 or 4 sessions of 1 or 2 pages"


async def test_span_that_cannot_be_recorded_is_computed_step_by_step(
    make_tiny_model: MakeTinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    tiny = make_tiny_model("llama")
    assert await decode(recording(tiny, 1, fail), PROMPT, COUNT, variant=FUSED) == tiny.tokens
    assert capsys.readouterr().err.count("not permitted when stream is capturing") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError, "decode steps of 1 sessions over 2 pages are not recorded: at its end"),
        (RuntimeError, "no more decode steps are recorded: at its end"),
    ],
    ids=["memory", "any"],
)
async def test_size_that_cannot_be_recorded_costs_no_recorded_one(
    error: type[RuntimeError], line: str, make_tiny_model: MakeTinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()

    def capture(step: Step) -> Step:
        if recorder.recorded == 1:
            recorder.recorded += 1
            raise error("at its end")
        return recorder(step)

    tiny, text = make_tiny_model("llama"), [*range(3, 30)]
    expected = await decode(recording(tiny, 1, lambda step: step), text, 12, variant=FUSED)
    engines = recording(tiny, 1, capture)
    assert await decode(engines, text, 12, variant=FUSED) == expected, "on two pages at the end"
    replays = recorder.replays
    assert await decode(engines, text, 12, variant=FUSED) == expected
    assert recorder.replays == 2 * replays > 0
    assert capsys.readouterr().err.count(line) == 1


@pytest.mark.parametrize("gathers", [True, False])
async def test_only_what_is_gathered_bounds_the_positions_of_a_recorded_step(
    gathers: bool, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "flash_attention_on", lambda _device: None if gathers else attention_by_contract)
    monkeypatch.setattr(batched, "MOST_GATHERED_ON_GPU", PAGE_POSITIONS)
    recorded: list[Step] = []

    def capture(step: Step) -> Step:
        recorded.append(step)
        return step

    tiny = make_tiny_model("llama")
    shard = TorchShard(tiny.source(WHOLE), WHOLE, NARROW, capture_on=lambda _device: capture)
    shard.prepare(BF16)
    await decode([InProcess(shard)], [*range(3, 80)], 4, variant=BF16)  # over three pages
    assert bool(recorded) is not gathers


def test_variant_that_could_not_be_warmed_leaves_no_weights(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama")
    shard = TorchShard(tiny.source(WHOLE), WHOLE, OPTIONS, capture_on=lambda _device: Recorder())
    norms: list[weakref.ref[torch.Tensor]] = []

    def fail(span: Any, _kv: object) -> None:
        norms.append(weakref.ref(span._segments._packed.norm))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(batched.BatchedSpan, "_warm", fail)
        with pytest.raises(NoVariantMemory, match="fused/fp32 takes more memory than"):
            shard.prepare(FUSED)
    assert [norm() for norm in norms] == [None]
    shard.prepare(FUSED)
    assert agreed(shard, FUSED, tiny) == 1.0


def test_recording_that_cannot_end_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.13, whose context manager does not put the stream back where the end of a recording raises."""
    stream = SimpleNamespace(wait_stream=lambda _other: None)
    current: list[object] = [stream]

    @contextmanager
    def use(other: object) -> Iterator[None]:
        before, current[0] = current[0], other
        yield
        current[0] = before

    @contextmanager
    def graph(*_: object, stream: object, **_options: object) -> Iterator[None]:
        current[0] = stream
        yield
        raise RuntimeError("the capture was invalidated")

    for name, fake in {
        "device": lambda _device: nullcontext(),
        "Stream": lambda: SimpleNamespace(wait_stream=lambda _other: None),
        "graph_pool_handle": object,
        "current_stream": lambda: current[0],
        "stream": use,
        "CUDAGraph": object,
        "graph": graph,
        "set_stream": lambda other: current.__setitem__(0, other),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaCapture(torch.device("cuda"))(lambda: torch.zeros(1))
    assert current[0] is stream


@pytest.mark.parametrize("capture", [None, Recorder()], ids=["step by step", "recorded"])
async def test_keys_and_values_in_bf16_take_half_the_pages(
    capture: Recorder | None, make_tiny_model: MakeTinyModel
) -> None:
    tiny = make_tiny_model("llama")
    shard = TorchShard(tiny.source(WHOLE), WHOLE, NARROW, capture_on=lambda _device: capture)
    shard.prepare(BF16)
    engine = InProcess(shard)
    text = [*range(3, 90)]
    assert agreed(shard, BF16, tiny) >= 0.7
    before = await decode([engine], text, 1, variant=BF16)
    options = SessionOptions(sampling=GREEDY, variant=BF16)
    for number in range(512 // PAGE_POSITIONS - 1):
        engine.open_now(session(number), 2 * PAGE_POSITIONS, options)
    engine.open_now(session(98), PAGE_POSITIONS, options)
    with pytest.raises(EngineFull):
        engine.open_now(session(99), PAGE_POSITIONS, options)
    for number in (*range(16), 98):
        engine.close_now(session(number), keep=False)
    # The pages of a common prefix, of twice as many positions, are found and copied.
    await engine.open(session(1), len(text) + 8, pages_of(text))
    assert await engine.begin(session(1), options) == 0
    rows = SliceInput(session=session(1), position=0, tensor=tensor_from_tokens(text), draws=1)
    first = tokens_from_tensor(engine.step_now([rows]).outputs[0].tensor)
    found = await engine.open(session(2), len(text) + 8, pages_of(text))
    assert found == {options.kv_key: 2 * PAGE_POSITIONS}
    assert await engine.begin(session(2), options) == 2 * PAGE_POSITIONS
    rest = SliceInput(session=session(2), position=64, tensor=tensor_from_tokens(text[64:]), draws=1)
    assert tokens_from_tensor(engine.step_now([rest]).outputs[0].tensor) == first == before


@pytest.mark.parametrize("variant", ["fused/fp32", "fused/bf16", "fused/int8", "fused/w8a8"])
def test_arithmetic_of_a_gpu_gives_close_tokens(
    variant: str, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "arithmetics_on", lambda _device: GPU_ARITHMETICS)
    monkeypatch.setattr(widened, "_GPU_PIECE_ELEMENTS", 100)
    tiny, chosen = make_tiny_model("llama"), Variant(*variant.split("/"))
    shard = TorchShard(tiny.source(WHOLE), WHOLE, NARROW)
    shard.prepare(chosen)
    assert agreed(shard, chosen, tiny) >= (1.0 if chosen == FUSED else 0.7)


def agreed(shard: TorchShard, variant: Variant, tiny: TinyModel) -> float:
    """Return the share of a model's tokens that a variant draws behind the ones before."""
    engine = InProcess(shard)
    engine.open_now(session(1), 60, SessionOptions(sampling=GREEDY, variant=variant))
    text = PROMPT + tiny.tokens[:-1]
    rows = SliceInput(session=session(1), position=0, tensor=tensor_from_tokens(text), draws=COUNT)
    drawn = tokens_from_tensor(engine.step_now([rows]).outputs[0].tensor)
    engine.close_now(session(1))
    return sum(one == other for one, other in zip(drawn, tiny.tokens, strict=True)) / COUNT


def test_int8_weights_are_multiplied_more_closely_than_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    device = torch.device(DEVICE)
    rows, matrix = (torch.randn(shape, generator=generator) for shape in ((5, 64), (48, 64)))
    rows[:, 7] *= 50  # as in language models, where a few elements are far larger than the others
    packed = pack("int8", [matrix], None, device)
    assert packed.scale is not None
    expected = rows.double() @ (packed.matrix.double() * packed.scale.double().unsqueeze(1)).t().cpu()
    errors = []
    for has_int8 in (True, False):
        monkeypatch.setattr(linear, "_has_int8_products", lambda _device, answer=has_int8: answer)
        product = GPU_ARITHMETICS["int8"][1](rows.to(device), packed).cpu()
        errors.append(float((product - expected).abs().max() / expected.abs().max()))
    assert 4 * errors[0] < errors[1] < 0.01


def test_matrix_is_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, matrix = (torch.randn(shape, generator=generator) for shape in ((5, 64), (48, 64)))
    monkeypatch.setattr(widened, "_GPU_PIECE_ELEMENTS", 64 * 5)
    pieces = multiply_pieces(rows, matrix.bfloat16())
    torch.testing.assert_close(pieces, rows @ matrix.bfloat16().float().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_gpu", [True, False])
def test_bf16_on_a_gpu_multiplies_the_weights_that_fp32_widens(
    is_gpu: bool, make_tiny_model: MakeTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BackendContext, "as_bf16", property(lambda _context: is_gpu))
    tiny = narrowed(make_tiny_model("llama, tied"), torch.bfloat16, tmp_path)
    info = TorchShard(tiny.source(WHOLE), WHOLE, NARROW).info
    memory_bytes = memory_for(tiny.source(WHOLE), info, 80)
    shard = TorchShard(tiny.source(WHOLE), WHOLE, replace(NARROW, memory_bytes=memory_bytes))
    shard.prepare(FUSED)
    if not is_gpu:
        with pytest.raises(EngineError, match=r"fused/bf16 takes .* bytes of memory"):
            shard.prepare(BF16)
        return
    shard.prepare(BF16)
    assert agreed(shard, BF16, tiny) >= 0.7
    assert agreed(shard, FUSED, tiny) == 1.0


def test_memory_of_a_gpu_holds_what_a_step_takes_besides(make_tiny_model: MakeTinyModel) -> None:
    """On a device whose tensors have no content."""
    source = make_tiny_model("llama").source(WHOLE)
    info = TorchShard(source, WHOLE, OPTIONS).info
    least = memory_for(source, info, PAGE_POSITIONS, "meta")
    assert least > memory_for(source, info, PAGE_POSITIONS, "cpu")
    shard = TorchShard(source, WHOLE, EngineOptions(memory_bytes=least, device="meta"))
    assert shard.info.kv_positions == PAGE_POSITIONS
    with pytest.raises(EngineError, match="bytes of memory are not enough"):
        TorchShard(source, WHOLE, EngineOptions(memory_bytes=least - 1, device="meta"))


def test_weights_are_widened_on_a_gpu_only_where_a_step_has_memory_beside_them(
    make_tiny_model: MakeTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = (torch.empty(0, 2, 8, device="meta") for _ in range(2))
    monkeypatch.setattr(TransformersSpan, "trial_run", lambda _span: (BlockKvCache(keys, values),))
    source = narrowed(make_tiny_model("gemma3"), torch.bfloat16, tmp_path).source(WHOLE)
    widened = load_span(source, WHOLE, torch.float32)
    least = widened.weight_bytes + reserve_bytes(source.config, is_last=True)
    for limit_bytes, dtype in ((least, torch.bfloat16), (2 * least, torch.float32)):
        options = EngineOptions(memory_bytes=limit_bytes, kv_positions=512, device="meta")
        assert TorchShard(source, WHOLE, options)._span.dtype == dtype


@gpu_only
@pytest.mark.parametrize("family", FAMILIES)
async def test_cuda_graphs_give_the_tokens_of_generate(
    family: str, make_tiny_model: MakeTinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_model(family)
    shard = TorchShard(tiny.source(WHOLE), WHOLE, NARROW)
    for variant in (FUSED, BF16, Variant("fused", "int8"), Variant("fused", "w8a8")):
        shard.prepare(variant)
    assert await decode([InProcess(shard)], PROMPT, COUNT, variant=FUSED) == tiny.tokens
    for variant in shard.variants():
        await decode([InProcess(shard)], PROMPT, COUNT, variant=variant)
    assert "recorded" not in capsys.readouterr().err


def attention_of(views: Sequence[AttentionView], queries: torch.Tensor, memory: BlockKvCache) -> torch.Tensor:
    return torch.cat([view.attend(queries, memory, 0.3) for view in views])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("seed", range(4))
def test_attention_of_sessions_together_is_that_of_each_alone(
    seed: int, window: int | None, dtype: torch.dtype
) -> None:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, groups, size, pages = 6, 2, 8, [*range(40)]
    chance.shuffle(pages)
    counts = sorted(chance.choice([1, 1, 2, 5, 33]) for _ in range(7))
    slices = [
        Rows(torch.zeros(count), SlotMapping([pages.pop() for _ in range(4)]), chance.randrange(60), 0)
        for count in counts
    ]
    shape = (40 * PAGE_POSITIONS, groups, size)
    memory = BlockKvCache(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)))
    for part in slices:  # what was never written need not be finite
        unwritten = part.slots.all[part.position + len(part.rows) :]
        memory.keys[unwritten] = memory.values[unwritten] = torch.nan
    queries = torch.randn(sum(counts), heads, size, generator=generator)
    views = views_on_gpu(slices, window, torch.device("cpu"))
    assert len(views) == 1, "so few scores are not worth a second operation"
    together, alone = attention_of(views, queries, memory), attention_of(views_on_cpu(slices, window), queries, memory)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def test_sessions_are_padded_together_as_long_as_it_wastes_little() -> None:
    decoding = [(1, 400)] * 16
    assert joint_groups(decoding) == [range(16)]
    assert joint_groups([*decoding, (512, 4000)]) == [range(16), range(16, 17)], "a prompt beside them"
    assert joint_groups([(1, 30_000)] * 3) == [range(1), range(1, 2), range(2, 3)], "too much memory for a copy"
    assert joint_groups([(1, 5)]) == [range(1)]


def attention_by_contract(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, one sequence after another."""
    assert {each.dtype for each in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    outputs = []
    ends = cu_seq_q.tolist()
    for number, length in enumerate(seqused_k.tolist()):
        rows = query[ends[number] : ends[number + 1]]
        assert len(rows) <= max_q
        assert length <= max_k
        keys, values = (pages[block_table[number].long()].flatten(0, 1)[:length] for pages in (key, value))
        last = torch.arange(length - len(rows), length, device=query.device).unsqueeze(1)
        distance = last - torch.arange(length, device=query.device)
        mask = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        query_, key_, value_ = (each.transpose(0, 1).unsqueeze(0) for each in (rows, keys, values))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query_, key_, value_, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", ["llama", "mistral"])
async def test_attention_through_page_tables_gives_the_same_tokens(
    family: str, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, tokens = make_tiny_model(family), []
    text = [*range(3, 80)]
    for attention in (None, attention_by_contract):
        monkeypatch.setattr(batched, "flash_attention_on", lambda _device, chosen=attention: chosen)
        # As it reads lengths on the host, it is not recorded by tracing, but by keeping the step.
        shard = TorchShard(tiny.source(WHOLE), WHOLE, NARROW, capture_on=lambda _device: lambda step: step)
        shard.prepare(BF16)
        tokens.append(await decode([InProcess(shard)], text, 8, chunk=30, variant=BF16))
    assert sum(one == other for one, other in zip(*tokens, strict=True)) >= 7


def test_attention_that_differs_from_torchs_is_found_out() -> None:
    def ignores_window(*tensors: object, **options: object) -> torch.Tensor:
        return attention_by_contract(*tensors, **{**options, "window_size": (-1, 0)})  # type: ignore[arg-type]

    assert is_attention(attention_by_contract, torch.device("cpu"))
    assert not is_attention(ignores_window, torch.device("cpu"))


def test_no_flash_attention_without_an_nvidia_gpu() -> None:
    assert flash_attention_on(torch.device("cpu")) is None


def test_no_flash_attention_where_its_library_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    assert flash_attention_on.__wrapped__(torch.device("cuda")) is None
