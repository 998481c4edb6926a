"""Sessions of one shard: what is reserved, taken back, drawn, refused."""

import json
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

import node.engine.torch_shard
from node.engine.interface import (
    REFERENCE,
    BadRequest,
    EngineError,
    EngineFull,
    EngineOptions,
    ShardSource,
    SliceFault,
    SliceInput,
    SliceOutput,
    StepResult,
    Variant,
)
from node.engine.kv_cache import SlotMapping
from node.engine.shard import SessionRows
from node.engine.torch_shard import TorchShard, open_torch_shard
from node.engine.worker_protocol import PREFIX, decode_header, decode_result, encode_result
from protocol.identity import BlockRange, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import DType, Tensor, tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import DEVICE, GREEDY, InProcess, decode, memory_for, session, spans, start, step
from tests.unit.engine.tiny_models import BLOCKS, COUNT, PROMPT, TinyModel

MakeTinyModel = Callable[[str], TinyModel]
WHOLE = BlockRange(0, BLOCKS)
OPTIONS = EngineOptions(kv_positions=100, device=DEVICE)


def shard_of(tiny: TinyModel, blocks: BlockRange = WHOLE, options: EngineOptions = OPTIONS) -> InProcess:
    return InProcess(TorchShard(tiny.source(blocks), blocks, options))


def tokens_of(shard: InProcess, of: SessionId, position: int, tokens: Sequence[int], draws: int) -> list[int]:
    rows = SliceInput(session=of, position=position, tensor=tensor_from_tokens(tokens), draws=draws)
    return tokens_from_tensor(shard.step_now([rows]).outputs[0].tensor)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
async def test_rewind_gives_the_same_tokens_again(family: str, make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model(family)
    engines = [shard_of(tiny, blocks) for blocks in spans(BLOCKS, 3)]
    for engine in engines:
        await start(engine, session(1), 60)
    text = PROMPT + tiny.tokens
    drawn = tokens_from_tensor(await step(engines, session(1), 0, text[:-1], COUNT))
    assert drawn == tiny.tokens
    # Further back than the sliding windows of 6 reach, twice, and over other tokens than those that stood there.
    await step(engines, session(1), 20, [1, 2, 3, 4, 5], 0)
    for position in (19, 9):
        rows = await step(engines, session(1), position, text[position:-1], 1)
        assert tokens_from_tensor(rows) == tiny.tokens[-1:]


async def test_sessions_are_isolated(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("qwen2")
    shard = shard_of(tiny)
    prompts = [PROMPT, PROMPT[:5], PROMPT[3:]]
    alone = [await decode([shard], prompt, 6) for prompt in prompts]
    for number, prompt in enumerate(prompts):
        shard.open_now(session(number), len(prompt) + 6)
    together: list[list[int]] = [[], [], []]
    rows = list(prompts)
    for _ in range(6):
        inputs = [
            SliceInput(
                session=session(number),
                position=len(prompts[number]) + len(together[number]) - (len(together[number]) > 0),
                tensor=tensor_from_tokens(rows[number]),
                draws=1,
            )
            if together[number]
            else SliceInput(session=session(number), position=0, tensor=tensor_from_tokens(rows[number]), draws=1)
            for number in range(3)
        ]
        for number, output in enumerate(shard.step_now(inputs).outputs):
            assert output.session == session(number)
            rows[number] = tokens_from_tensor(output.tensor)
            together[number] += rows[number]
    assert together == alone


def test_prefill_chunk_draws_no_token(make_tiny_model: MakeTinyModel) -> None:
    shard = shard_of(make_tiny_model("llama"))
    shard.open_now(session(1), 20)
    assert tokens_of(shard, session(1), 0, PROMPT[:4], draws=0) == []


async def test_sampling_is_replayed_on_other_spans(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    cuts = [[shard_of(tiny, blocks) for blocks in spans(BLOCKS, count)] for count in (1, 3)]
    warm = Sampling(max_tokens=1, temperature=1.5, top_p=0.9, seed=7)
    first, again = [await decode(engines, PROMPT, COUNT, sampling=warm) for engines in cuts]
    assert first == again
    assert first != tiny.tokens
    assert await decode(cuts[0], PROMPT, COUNT, sampling=replace(warm, seed=8)) != first


@pytest.mark.parametrize(
    ("way", "asked"),
    [
        ({"repetition_penalty": 1.7, "prompt_length": len(PROMPT)}, {"repetition_penalty": 1.7}),
        ({"repetition_penalty": 0.6, "prompt_length": len(PROMPT)}, {"repetition_penalty": 0.6}),
        ({"logit_bias": ((3, 1.5), (26, -100.0))}, {"sequence_bias": [[[3], 1.5], [[26], -100.0]]}),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
async def test_greedy_text_with_penalties_is_that_of_generate(
    make_tiny_model: MakeTinyModel, way: dict[str, Any], asked: dict[str, Any], count: int
) -> None:
    tiny = make_tiny_model("llama")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.folder)
    model.generation_config.eos_token_id = None
    whole = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=COUNT, pad_token_id=0, **asked)
    expected = whole[0, len(PROMPT) :].tolist()
    assert expected != tiny.tokens
    engines = [shard_of(tiny, blocks) for blocks in spans(BLOCKS, count)]
    assert await decode(engines, PROMPT, COUNT, sampling=Sampling(max_tokens=1, **way)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_rejected_drafts_and_rewinds_leave_no_penalty(make_tiny_model: MakeTinyModel, temperature: float) -> None:
    tiny = make_tiny_model("llama")
    engines = [shard_of(tiny, blocks) for blocks in spans(BLOCKS, 3)]
    sampling = Sampling(
        max_tokens=1,
        temperature=temperature,
        top_k=20,
        seed=4,
        repetition_penalty=1.3,
        frequency_penalty=0.7,
        presence_penalty=0.4,
        prompt_length=len(PROMPT),
    )
    plain = await decode(engines, PROMPT, 12, sampling=sampling)
    for engine in engines:
        await start(engine, session(1), 60, sampling)
    drawn = tokens_from_tensor(await step(engines, session(1), 0, PROMPT, 1, history=PROMPT))
    wrong = [(token + 1) % 50 for token in plain]
    while len(drawn) < 9:
        at = len(drawn)
        # Two right drafts, then a wrong one and what would follow from it.
        drafts = (*plain[at : at + 2], wrong[at + 2], wrong[at + 3])
        rows = [*drawn[-1:], *drafts]
        drawn += tokens_from_tensor(
            await step(engines, session(1), len(PROMPT) + at - 1, rows, len(rows), drafts=drafts)
        )
        assert drawn == plain[: at + 3]
    for start_at in (6, 3):
        text = [*PROMPT, *plain[:start_at]]
        again = await step(engines, session(1), len(text) - 1, text[-1:], 1)
        assert tokens_from_tensor(again) == [plain[start_at]], "what was drawn behind it counts no more"
    # Another coordinator's route goes on from the middle, and is told the tokens so far anew.
    for start_at in (4, 2):
        text = [*PROMPT, *plain[:start_at]]
        again = await step(engines, session(1), len(text) - 1, text[-1:], 1, history=text)
        assert tokens_from_tensor(again) == [plain[start_at]]


def test_penalties_need_the_tokens_so_far(make_tiny_model: MakeTinyModel) -> None:
    shard = shard_of(make_tiny_model("llama"))
    sampling = Sampling(max_tokens=1, presence_penalty=1.0, prompt_length=4)
    for history in (None, PROMPT[:3]):
        shard.open_now(session(1), 20, shard.options(sampling))
        rows = SliceInput(
            session=session(1), position=0, tensor=tensor_from_tokens(PROMPT[:4]), draws=1, history=history
        )
        with pytest.raises(EngineError, match="of the 4 tokens that penalties depend on"):
            shard.step_now([rows])


def test_reservations_are_never_overcommitted_and_always_freed(make_tiny_model: MakeTinyModel) -> None:
    shard = shard_of(make_tiny_model("llama"))
    shard.open_now(session(1), 60)
    with pytest.raises(EngineFull, match="64 of 128 are free"):
        shard.open_now(session(2), 65)
    shard.open_now(session(2), 40)
    with pytest.raises(EngineError, match="not open"):
        tokens_of(shard, session(3), 0, PROMPT, 1)
    with pytest.raises(EngineError, match="exceed"):
        tokens_of(shard, session(2), 0, list(range(41)), 1)
    shard.open_now(session(4), 40)  # the failed step has closed session 2
    shard.close_now(session(1))
    shard.close_now(session(1))
    shard.open_now(session(5), 60)
    with pytest.raises(EngineFull):
        shard.open_now(session(6), 1)


@pytest.mark.parametrize(
    ("position", "tensor", "draws", "complaint"),
    [
        (1, tensor_from_tokens([1]), 1, "do not follow"),
        (-1, tensor_from_tokens([1]), 1, "do not follow"),
        (0, tensor_from_tokens([]), 0, "0 rows"),
        (0, tensor_from_tokens([1]), 2, "cannot draw 2"),
        (0, tensor_from_tokens([1, 97]), 1, "not below 97"),
        (0, tensor_from_tokens([-1]), 1, "not below 97"),
        (0, Tensor(DType.FLOAT32, (1, 32), bytes(128)), 1, "takes token ids"),
    ],
)
def test_bad_rows_cost_their_session_alone(
    position: int, tensor: Tensor, draws: int, complaint: str, make_tiny_model: MakeTinyModel
) -> None:
    shard = shard_of(make_tiny_model("llama"))
    for number in (1, 2):
        shard.open_now(session(number), 50)
    with pytest.raises(EngineError, match=complaint):
        shard.step_now([SliceInput(session=session(1), position=position, tensor=tensor, draws=draws)])
    with pytest.raises(EngineError, match="not open"):
        tokens_of(shard, session(1), 0, PROMPT, 1)
    assert tokens_of(shard, session(2), 0, PROMPT, 1) == make_tiny_model("llama").tokens[:1]


@pytest.mark.parametrize("variant", [REFERENCE, Variant("fused", "fp32")])
@pytest.mark.parametrize("guilty", [{0}, {3}, {6}, {1, 5}, {0, 1, 2, 3, 4, 5}])
def test_failed_forward_pass_costs_only_the_faulty_sessions(
    variant: Variant, guilty: set[int], make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing = TorchShard(make_tiny_model("llama").source(WHOLE), WHOLE, replace(OPTIONS, kv_positions=500))
    shard = InProcess(computing)
    if variant != REFERENCE:
        computing.prepare(variant)
    prompts = [[*PROMPT[number:], number] for number in range(7)]

    def step_all(numbers: Sequence[int], at: int = 0) -> StepResult:
        rows = [tensor_from_tokens(prompts[number][at:]) for number in numbers]
        return shard.step_now(
            [SliceInput(session=session(n), position=at, tensor=t, draws=1) for n, t in zip(numbers, rows, strict=True)]
        )

    options = replace(shard.options(GREEDY), variant=variant)
    for number in range(7):
        shard.open_now(session(number), 40, options)
    alone = [tokens_from_tensor(step_all([number]).outputs[0].tensor) for number in range(7)]
    compute, passes = computing._compute, []
    bad = {id(computing._sessions[session(number)].kv) for number in guilty}

    def fail(
        variant: Variant, blocks: BlockRange, parts: Sequence[SessionRows[SlotMapping]]
    ) -> Sequence[npt.NDArray[np.float32]]:
        passes.append(len(parts))
        computed = compute(variant, blocks, parts)  # which has written keys and values, too
        if bad & {id(part.kv) for part in parts}:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return computed

    monkeypatch.setattr(shard.shard, "_compute", fail)
    result = step_all(range(7))
    assert {fault.session for fault in result.faults} == {session(number) for number in guilty}
    assert all("forward pass failed: mat1" in fault.message and not fault.by_rows for fault in result.faults)
    innocent = [number for number in range(7) if number not in guilty]
    assert [output.session for output in result.outputs] == [session(number) for number in innocent]
    assert [tokens_from_tensor(output.tensor) for output in result.outputs] == [alone[n] for n in innocent]
    assert len(passes) <= (7 if variant == REFERENCE else 1 + 6 * len(guilty))
    # What was written stands: the last row again gives the same token again.
    again = step_all(innocent, at=4)
    assert [tokens_from_tensor(output.tensor) for output in again.outputs] == [alone[n] for n in innocent]
    with pytest.raises(EngineError, match="not open"):
        step_all(sorted(guilty)[:1])


class SlowConstraint:
    """Takes a tenth of a second for each mask, without spending it, or fails."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self.spent_s = 0.0

    def allowed(self, text: Sequence[int]) -> tuple[npt.NDArray[np.bool_], bool]:
        self.spent_s += 0.1
        if self.schema == "bad":
            raise BadRequest("it admits nothing")
        return np.ones(1000, np.bool_), True

    def close(self) -> None:
        pass


def constrained(shard: TorchShard, monkeypatch: pytest.MonkeyPatch, *sessions: tuple[str, Variant]) -> InProcess:
    """Open a session of a shard for each schema, which may be empty, and variant."""
    opened = InProcess(shard)
    monkeypatch.setattr(shard, "_constraint_process", lambda: SimpleNamespace(open=SlowConstraint))
    for number, (schema, variant) in enumerate(sessions):
        sampling = Sampling(max_tokens=9, json_schema=schema, prompt_length=len(PROMPT) if schema else 0)
        opened.open_now(session(number), 40, replace(opened.options(sampling), variant=variant))
    return opened


def prompts(shard: InProcess, count: int, *, is_new: bool = True) -> StepResult:
    """Run a step with the prompt of each session. `is_new`: their history was not given yet."""
    rows = tensor_from_tokens(PROMPT)
    return shard.step_now(
        [
            SliceInput(session=of, position=0, tensor=rows, draws=1, history=PROMPT if is_new else None)
            for of in map(session, range(count))
            if of in shard.shard._sessions
        ]
    )


def test_constraints_of_a_step_have_a_quarter_of_a_second_together(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama")
    computing = TorchShard(tiny.source(WHOLE), WHOLE, replace(OPTIONS, kv_positions=600))
    shard = constrained(computing, monkeypatch, *[("{}", REFERENCE)] * 8, ("", REFERENCE))
    served: list[set[int]] = []
    tokens: set[int] = set()
    for number in range(3):
        result = prompts(shard, 9, is_new=not number)
        served.append({of for of in range(9) if session(of) not in result.left_out})
        assert [output.session for output in result.outputs] == [session(of) for of in sorted(served[-1])]
        tokens.update(token for output in result.outputs for token in tokens_from_tensor(output.tensor))
    # The last one has no schema. Those that had their turn come again once all others had theirs.
    assert served == [{0, 1, 2, 8}, {3, 4, 5, 8}, {6, 7, 0, 8}]
    assert tokens == {tiny.tokens[0]}


def test_failed_constraints_leave_other_texts_out_and_do_not_end_them(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing = TorchShard(make_tiny_model("llama").source(WHOLE), WHOLE, replace(OPTIONS, kv_positions=600))
    shard = constrained(computing, monkeypatch, *[("bad", REFERENCE)] * 3, ("{}", REFERENCE))
    result = prompts(shard, 4)
    assert [fault.session for fault in result.faults] == [session(number) for number in range(3)]
    assert (result.outputs, result.left_out) == ((), (session(3),))
    assert len(prompts(shard, 4, is_new=False).outputs) == 1


def test_variants_take_turns_for_the_time_of_constraints(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = Variant("fused", "fp32")
    computing = TorchShard(make_tiny_model("llama").source(WHOLE), WHOLE, replace(OPTIONS, kv_positions=600))
    computing.prepare(fused)
    shard = constrained(computing, monkeypatch, *[("{}", REFERENCE)] * 3, ("{}", fused))
    assert prompts(shard, 4).left_out == (session(3),)
    assert prompts(shard, 4, is_new=False).left_out == (session(2),)


def test_left_out_slices_survive_the_way_between_processes() -> None:
    given = StepResult(
        outputs=(SliceOutput(session=session(2), tensor=tensor_from_tokens([7])),),
        compute_s=0.5,
        faults=(SliceFault(session(0), "admits nothing", by_request=True),),
        left_out=(session(1), session(3)),
    )
    frame = b"".join(encode_result(4, given))
    length, payload_bytes = PREFIX.unpack_from(frame)
    header = decode_header(frame[PREFIX.size : PREFIX.size + length])
    found = decode_result(header, memoryview(frame)[-payload_bytes:], [session(number) for number in range(4)])
    assert (found.faults, found.left_out, found.compute_s) == (given.faults, given.left_out, given.compute_s)
    assert [(each.session, tokens_from_tensor(each.tensor)) for each in found.outputs] == [(session(2), [7])]


def test_non_finite_outputs_fail_their_session_as_engine_fault(make_tiny_model: MakeTinyModel) -> None:
    for blocks in (BlockRange(1, 3), BlockRange(3, 4)):
        shard = shard_of(make_tiny_model("llama"), blocks)
        rows = [
            Tensor(DType.FLOAT32, (1, 32), array("f", [value] * 32).tobytes()) for value in (1.0, float("inf"), 2.0)
        ]
        for number in range(3):
            shard.open_now(session(number), 30)
        inputs = [SliceInput(session=session(n), position=0, tensor=rows[n], draws=0) for n in range(3)]
        if blocks.end == BLOCKS:
            inputs = [replace(each, draws=1) for each in inputs]
        result = shard.step_now(inputs)
        assert [output.session for output in result.outputs] == [session(0), session(2)]
        assert [(fault.session, fault.by_rows) for fault in result.faults] == [(session(1), False)]


def test_hidden_states_of_another_model_are_refused(make_tiny_model: MakeTinyModel) -> None:
    shard = shard_of(make_tiny_model("llama"), BlockRange(1, 2))
    shard.open_now(session(1), 50)
    rows = Tensor(DType.FLOAT32, (1, 16), bytes(64))
    with pytest.raises(EngineError, match="hidden states of 32 elements"):
        shard.step_now([SliceInput(session=session(1), position=0, tensor=rows, draws=0)])


def test_nan_logits_draw_no_token(make_tiny_model: MakeTinyModel) -> None:
    shard = shard_of(make_tiny_model("llama"), BlockRange(3, 4))
    shard.open_now(session(1), 50)
    rows = Tensor(DType.FLOAT32, (1, 32), array("f", [float("nan")] * 32).tobytes())
    with pytest.raises(EngineError, match="not finite"):
        shard.step_now([SliceInput(session=session(1), position=0, tensor=rows, draws=1)])


def test_a_span_holds_its_own_weights_only(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    info = shard_of(tiny, BlockRange(1, 3)).info
    files = [tiny.folder / f"{block}.safetensors" for block in (1, 2)]
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert info.weight_bytes == sum(file.stat().st_size for file in files) - headers
    assert info.kv_bytes_per_position == 2 * 2 * 2 * 8 * 4  # blocks · keys and values · heads · head size · f32


def test_memory_limit_bounds_kv_positions(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    blocks = BlockRange(1, 3)
    info = shard_of(tiny, blocks).info
    memory_bytes = memory_for(tiny.source(blocks), info, 140)  # the longest text has 128: it comes first
    least = memory_for(tiny.source(blocks), info, 0)
    assert (
        shard_of(tiny, blocks, EngineOptions(memory_bytes=memory_bytes, device=DEVICE)).info.kv_positions == 128
    )  # planned
    with pytest.raises(EngineError, match="bytes of memory are not enough"):
        shard_of(tiny, blocks, EngineOptions(memory_bytes=least, device=DEVICE))
    with pytest.raises(EngineError, match=f"not enough: the weights take {info.weight_bytes}$"):
        shard_of(tiny, blocks, EngineOptions(memory_bytes=least - 1, device=DEVICE))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (torch.OutOfMemoryError("tried to allocate"), "cuda:7 has too little memory left: see --memory"),
        (RuntimeError("CUDA error:\n no kernel image"), "cuda:7 failed: CUDA error: no kernel image"),
    ],
)
def test_gpu_error_is_one_line(
    fault: Exception, says: str, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise fault

    monkeypatch.setattr(node.engine.torch_shard, "load_span", fail)
    with pytest.raises(EngineError, match=f"^{says}$"):
        open_torch_shard(make_tiny_model("llama").source(WHOLE), WHOLE, EngineOptions(device="cuda:7"))


CANNOT_BE_SERVED: dict[str, tuple[dict[str, Any], str]] = {
    "nonesuch": ({"model_type": "nonesuch"}, "does not know the architecture 'nonesuch'"),
    "nothing": ({}, "does not know the architecture 'None'"),
    "mamba": (
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97},
        r"Mamba \(mamba\) uses state-space \(Mamba\) layers, which cannot be split into spans here",
    ),
    "t5": ({"model_type": "t5"}, r"T5 \(t5\) is an encoder-decoder"),
    "quantised": ({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, "import unquantised ones"),
    "odd sizes": ({"model_type": "gpt2", "n_embd": 33, "n_head": 4, "n_layer": 2}, "config is not valid"),
    "wrong types": ({"model_type": "llama", "hidden_size": "wide"}, "config is not valid"),
}


@pytest.mark.parametrize("case", CANNOT_BE_SERVED)
def test_unservable_model_is_refused_in_one_line(case: str) -> None:
    config, complaint = CANNOT_BE_SERVED[case]
    source = ShardSource(model=ModelId("0" * 64), config=config, block_files={0: Path("0"), 1: Path("1")})
    with pytest.raises(EngineError, match=complaint) as caught:
        TorchShard(source, BlockRange(0, 2), OPTIONS)
    assert "\n" not in str(caught.value)


def test_files_that_lack_or_spoil_weights_are_refused(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    tiny = make_tiny_model("llama")
    sound = tiny.source(WHOLE)
    spoilt, other = tmp_path / "spoilt.safetensors", tmp_path / "other.safetensors"
    spoilt.write_bytes(sound.block_files[1].read_bytes()[:-100])
    shutil.copy(sound.block_files[2], other)
    wide = {**tiny.config, "intermediate_size": 64}
    for source, complaint in (
        (replace(sound, head_file=None), r"lack (model\.norm|lm_head)\.weight"),
        (replace(sound, embed_file=None), r"lack model\.embed_tokens\.weight"),
        (replace(sound, block_files={**sound.block_files, 1: other}), r"lack model\.layers\.1\."),
        (replace(sound, block_files={**sound.block_files, 1: spoilt}), "cannot be loaded"),
        (replace(sound, block_files={**sound.block_files, 1: tmp_path / "gone"}), "cannot be loaded"),
        (replace(sound, block_files={0: sound.block_files[0]}), "file of block 1 is not given"),
        (replace(sound, config=wide), "do not fit the model's config"),
    ):
        with pytest.raises(EngineError, match=complaint) as caught:
            TorchShard(source, WHOLE, OPTIONS)
        assert "\n" not in str(caught.value)


def test_the_decoder_of_a_multimodal_checkpoint_is_served(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    tiny = make_tiny_model("gemma3")
    for file in tiny.folder.glob("*.safetensors"):
        nest_names(file, tmp_path / file.name)
    text_config = {"model_type": "gemma3_text", **{k: v for k, v in tiny.config.items() if k != "model_type"}}
    nested = replace(tiny, folder=tmp_path, config={**tiny.config, "model_type": "gemma3", "text_config": text_config})
    shard = shard_of(nested)
    shard.open_now(session(1), 50)
    assert tokens_of(shard, session(1), 0, PROMPT + tiny.tokens[:-1], COUNT) == tiny.tokens


def nest_names(source: Path, target: Path) -> None:
    """Rename tensors as multimodal checkpoints do: one level deeper."""
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    nested = json.dumps({k if k.startswith("__") else f"language_model.{k}": v for k, v in header.items()}).encode()
    target.write_bytes(len(nested).to_bytes(8, "little") + nested + data[8 + length :])
