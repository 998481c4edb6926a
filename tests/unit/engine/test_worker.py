"""The engine in real worker processes: exact, in order, and its faults are those of the calls they concern."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import psutil
import pytest
import tokenizers
import trio
import trio.testing
from tokenizers import decoders, models, pre_tokenizers
from trio.testing import MockClock

from node.engine import client, on_demand, worker, worker_process, worker_protocol
from node.engine.client import WorkerEngine, start_worker
from node.engine.interface import (
    PAGE_POSITIONS,
    REFERENCE,
    BadRequest,
    EngineCrashed,
    EngineError,
    EngineFull,
    EngineLost,
    EngineOptions,
    KvCompatibilityKey,
    NoVariantMemory,
    Prefix,
    SessionOptions,
    SliceInput,
    StepFailed,
    Variant,
    VariantNotReady,
)
from node.engine.shard import Shard
from node.engine.torch_shard import TorchShard
from node.engine.worker_process import READ_AHEAD_BYTES, SpareWorker, WorkerExited, WorkerProcess
from node.engine.worker_protocol import Buffer, Header
from node.testing.fake_engine import fake_span_info
from node.util.child_process import Child
from node.util.interpreter import python
from protocol.identity import BlockRange
from protocol.messages import Sampling
from protocol.tensors import DType, Tensor, tensor_from_tokens, tokens_from_tensor
from tests.support import hostile_directory
from tests.unit.engine.driving import (
    DEVICE,
    GREEDY,
    InProcess,
    decode,
    memory_for,
    pages_of,
    session,
    spans,
    start,
    step,
)
from tests.unit.engine.tiny_models import BLOCKS, COUNT, PROMPT, VOCABULARY, TinyModel

MakeTinyModel = Callable[[str], TinyModel]
WHOLE = BlockRange(0, BLOCKS)
OPTIONS = EngineOptions(kv_positions=100, threads=1, device=DEVICE)
TIMEOUT_S = 60
"""Longer than anything here takes on a busy machine."""


@asynccontextmanager
async def workers(tiny: TinyModel, count: int) -> AsyncIterator[list[WorkerEngine]]:
    """Run a model in several worker processes, started together."""
    engines: dict[BlockRange, WorkerEngine] = {}
    leave = trio.Event()

    async def run(blocks: BlockRange, *, task_status: trio.TaskStatus[None]) -> None:
        async with start_worker(tiny.source(blocks), blocks, OPTIONS) as engine:
            engines[blocks] = engine
            task_status.started()
            await leave.wait()

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for blocks in spans(BLOCKS, count):
                starting.start_soon(nursery.start, run, blocks)
        yield [engines[blocks] for blocks in spans(BLOCKS, count)]
        leave.set()


@asynccontextmanager
async def stopped(engine: WorkerEngine) -> AsyncIterator[int]:
    """Stop the worker as if it computed for a long time; give its process id."""
    pid = engine.statistics().worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):  # the test may have killed it
            os.kill(pid, signal.SIGCONT)


def break_library(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the workers started from now on find a library that cannot be imported."""
    (folder / f"{name}.py").write_text("raise ImportError('lib.so: cannot enable executable stack:\\nrefused')")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def rows(number: int, position: int, tokens: list[int]) -> SliceInput:
    return SliceInput(session=session(number), position=position, tensor=tensor_from_tokens(tokens), draws=1)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gemma3", marks=pytest.mark.soak)])
async def test_spans_in_processes_give_the_tokens_of_generate(family: str, make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model(family)
    async with workers(tiny, 2) as engines:
        assert await decode(engines, PROMPT, COUNT, chunk=4) == tiny.tokens
        statistics = engines[1].statistics()
        assert (statistics.reserved_positions, statistics.steps) == (0, 3 + COUNT - 1)
        assert 0 < statistics.compute_s < TIMEOUT_S


async def test_calls_of_one_worker(make_tiny_model: MakeTinyModel) -> None:
    """One worker for all of them, which takes long to start: each begins without a session."""
    tiny = make_tiny_model("llama")
    async with start_worker(tiny.source(WHOLE), WHOLE, OPTIONS) as engine:
        for check in (
            all_sampling_options_reach_the_worker,
            overlapping_steps_run_in_call_order,
            cancelled_step_does_not_affect_other_answers,
            opening_and_closing_do_not_wait_for_a_computation,
            failed_slice_costs_only_its_own_session,
            prefix_cache_reuses_pages_of_an_earlier_session,
        ):
            await check(engine, tiny)
            for number in (1, 2, 3):
                await engine.close(session(number))
            statistics = engine.statistics()
            assert statistics.reserved_positions == 0, check.__name__
        await killed_worker_fails_its_calls_with_engine_crashed(engine, tiny)


async def all_sampling_options_reach_the_worker(engine: WorkerEngine, tiny: TinyModel) -> None:
    sampling = Sampling(
        max_tokens=1,
        temperature=0.8,
        seed=2**64 - 1,
        top_k=9,
        min_p=0.01,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        logit_bias=((3, -2.0), (5, 1.0)),
        stop_tokens=(1, 2),
        min_length=len(PROMPT) + 3,
        prompt_length=len(PROMPT),
    )
    here = InProcess(TorchShard(tiny.source(WHOLE), WHOLE, OPTIONS))
    assert await decode([engine], PROMPT, COUNT, sampling=sampling) == await decode(
        [here], PROMPT, COUNT, sampling=sampling
    )


async def overlapping_steps_run_in_call_order(engine: WorkerEngine, tiny: TinyModel) -> None:
    text = PROMPT + tiny.tokens
    drawn: dict[int, list[int]] = {}
    await start(engine, session(1), 60)

    async def take(position: int) -> None:
        result = await engine.step([rows(1, position, text[position : position + 4])])
        drawn[position] = tokens_from_tensor(result.outputs[0].tensor)

    async with stopped(engine), trio.open_nursery() as nursery:
        for position in range(0, 24, 4):
            nursery.start_soon(take, position)
            await trio.testing.wait_all_tasks_blocked()
        os.kill(engine.statistics().worker_pid or 0, signal.SIGCONT)
    assert drawn == {position: [text[position + 4]] if position >= 8 else drawn[position] for position in drawn}
    assert sorted(drawn) == list(range(0, 24, 4))  # answers that arrive together wake their tasks in any order


async def cancelled_step_does_not_affect_other_answers(engine: WorkerEngine, tiny: TinyModel) -> None:
    await start(engine, session(1), 60)
    await start(engine, session(2), 30)
    async with stopped(engine):
        # More bytes than fit into the socket: some calls are cancelled before they were sent, some after. None is
        # legal, so that they cost no time.
        with trio.move_on_after(0.2):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(engine.step, [rows(2, 0, [1] * 10_000)])
    drawn = await step([engine], session(1), 0, PROMPT, 1)
    assert tokens_from_tensor(drawn) == tiny.tokens[:1]


async def opening_and_closing_do_not_wait_for_a_computation(engine: WorkerEngine, tiny: TinyModel) -> None:
    async with stopped(engine):
        with trio.fail_after(TIMEOUT_S):
            await start(engine, session(1), 60)
            with pytest.raises(EngineFull):
                await start(engine, session(2), 65)
            await engine.close(session(1))
            await engine.close(session(1))
            for number in range(10_000):
                await start(engine, session(number), 100)
                await engine.close(session(number))
    assert engine.statistics().reserved_positions == 0
    assert await decode([engine], PROMPT, COUNT) == tiny.tokens


async def failed_slice_costs_only_its_own_session(engine: WorkerEngine, tiny: TinyModel) -> None:
    for number in (1, 2, 3):
        await start(engine, session(number), 30)
    result = await engine.step([rows(1, 0, PROMPT), rows(2, 0, [97]), rows(4, 0, PROMPT)])
    assert [tokens_from_tensor(output.tensor) for output in result.outputs] == [tiny.tokens[:1]]
    faults = {fault.session: fault for fault in result.faults}
    assert faults.keys() == {session(2), session(4)}
    assert faults[session(2)].by_rows
    assert "not open" in faults[session(4)].message
    assert engine.statistics().reserved_positions == 64
    with pytest.raises(StepFailed, match="not open"):
        await engine.step([rows(2, 0, PROMPT)])
    with pytest.raises(StepFailed, match="not below 97") as failed:
        await engine.step([rows(3, 0, [97])])
    assert failed.value.faults[0].by_rows
    await start(engine, session(2), 30)
    result = await engine.step([rows(1, 0, PROMPT), rows(2, 0, PROMPT)])
    assert [tokens_from_tensor(output.tensor) for output in result.outputs] == [tiny.tokens[:1]] * 2


async def prefix_cache_reuses_pages_of_an_earlier_session(engine: WorkerEngine, tiny: TinyModel) -> None:
    text = [*PROMPT, *tiny.tokens, *PROMPT]
    prefix = Prefix(namespace="me", hashes=b"one page of text")
    drawn = []
    for number, found in ((1, {}), (2, {KvCompatibilityKey(REFERENCE, "fp32"): 32})):
        assert await engine.open(session(number), 48, prefix) == found
        cached = await engine.begin(session(number), SessionOptions(variant=REFERENCE, sampling=GREEDY))
        drawn.append(tokens_from_tensor(await step([engine], session(number), cached, text[cached:], 1)))
        await engine.close(session(number))
    statistics = engine.statistics()
    assert (statistics.cached_positions, statistics.reserved_positions) == (32, 0)
    assert drawn[0] == drawn[1]


async def killed_worker_fails_its_calls_with_engine_crashed(engine: WorkerEngine, tiny: TinyModel) -> None:
    raised: list[str] = []
    await start(engine, session(1), 60)

    async def take() -> None:
        with pytest.raises(EngineCrashed) as caught:
            await engine.step([rows(1, 0, PROMPT)])
        raised.append(str(caught.value))

    async with stopped(engine) as pid, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(TIMEOUT_S):
            reason = await engine.wait_crashed()
    assert raised == [reason] * 3
    assert reason == "the worker of blocks 0-4 was killed by SIGKILL"
    with pytest.raises(EngineCrashed):
        await start(engine, session(2), 1)
    await engine.close(session(1))
    statistics = engine.statistics()
    assert (statistics.reserved_positions, statistics.worker_pid) == (0, None)


async def test_span_load_failure_is_one_line(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    source = replace(make_tiny_model("llama").source(WHOLE), head_file=tmp_path / "gone")
    with pytest.raises(EngineError, match=r"^blocks 0-4 cannot be loaded: .*gone") as caught:
        async with start_worker(source, WHOLE, OPTIONS):
            pass
    assert not isinstance(caught.value, EngineCrashed)


async def test_a_worker_imports_nothing_from_the_current_directory(
    make_tiny_model: MakeTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama")
    mark = hostile_directory.fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    async with start_worker(tiny.source(WHOLE), WHOLE, OPTIONS) as engine:
        assert await decode([engine], PROMPT, COUNT) == tiny.tokens
    assert not mark.exists()


async def test_worker_crash_reports_its_last_stderr_line(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "python", lambda *_: python("-c", "raise ImportError('no torch here')"))
    with pytest.raises(EngineCrashed, match=r"^the worker of blocks 0-4 exited with 1: ImportError: no torch here$"):
        async with start_worker(make_tiny_model("llama").source(WHOLE), WHOLE, OPTIONS):
            pass


async def test_worker_start_times_out(make_tiny_model: MakeTinyModel) -> None:
    source = make_tiny_model("llama").source(WHOLE)
    with pytest.raises(EngineError, match=r"did not load within 0\.01 s"):
        async with start_worker(source, WHOLE, replace(OPTIONS, start_timeout_s=0.01)):
            pass


async def test_spare_worker_serves_the_first_engine(make_tiny_model: MakeTinyModel) -> None:
    source = make_tiny_model("llama").source(WHOLE)
    spare = SpareWorker(OPTIONS)
    async with trio.open_nursery() as nursery:
        await nursery.start(spare.run)
        before = workers_of_this_process()
        async with start_worker(source, WHOLE, OPTIONS, spare=spare) as first:
            assert {first.statistics().worker_pid} == before
            # The second one has a process of its own, with which nothing happens to the first.
            with pytest.raises(EngineError, match="did not load"):
                async with start_worker(source, WHOLE, replace(OPTIONS, start_timeout_s=0.01), spare=spare):
                    pass
            assert workers_of_this_process() == before
            assert await decode([first], [1, 2, 3], 1)
    assert workers_of_this_process() == set()


async def test_unused_spare_worker_ends_with_its_node() -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(SpareWorker(OPTIONS).run)
        with trio.fail_after(TIMEOUT_S):
            while not workers_of_this_process():  # its command line is not there at once
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert workers_of_this_process() == set()


def workers_of_this_process() -> set[int]:
    """The processes of workers that run."""
    children = psutil.Process().children()
    return {child.pid for child in children if "node.engine.worker" in child.cmdline()}


def test_a_worker_ends_with_its_parent() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "node.engine.worker", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as worker:
        theirs.close()
        ours.close()
        assert worker.wait(TIMEOUT_S) == 0


def has_one_entry(folder: Path) -> bool:
    return len(list(folder.iterdir())) == 1


async def test_variants_are_built_beside_the_steps(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    tiny = make_tiny_model("llama")
    fused, graphs, wanting = Variant("fused", "fp32"), Variant("onnxruntime", "fp32"), Variant("fused", "fp4")
    async with start_worker(tiny.source(WHOLE), WHOLE, replace(OPTIONS, cache_dir=tmp_path, device="cpu")) as engine:
        await engine.open(session(1), 10)
        with pytest.raises(VariantNotReady, match="fused/fp32 is not ready"):
            await engine.begin(session(1), SessionOptions(sampling=GREEDY, variant=fused))
        assert engine.statistics().reserved_positions == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.prepare, fused)
            await trio.testing.wait_all_tasks_blocked()
            assert engine.variants() == {REFERENCE}
            assert await decode([engine], PROMPT, COUNT) == tiny.tokens
        await engine.prepare(graphs)
        assert engine.variants() == {REFERENCE, fused, graphs}
        for variant in (fused, graphs):
            assert await decode([engine], PROMPT, COUNT, chunk=4, variant=variant) == tiny.tokens
        assert has_one_entry(tmp_path), "the graphs are not kept"
        with pytest.raises(EngineError, match="no variant fused/fp4"):
            await engine.prepare(wanting)


async def test_worker_drops_a_variant_for_another_one(make_tiny_model: MakeTinyModel) -> None:
    tiny = make_tiny_model("llama")
    fused, rounded = Variant("fused", "fp32"), Variant("fused", "int8")
    info = TorchShard(tiny.source(WHOLE), WHOLE, OPTIONS).info
    memory_bytes = memory_for(tiny.source(WHOLE), info, 80)
    async with start_worker(tiny.source(WHOLE), WHOLE, replace(OPTIONS, memory_bytes=memory_bytes)) as engine:
        await engine.prepare(rounded)
        with pytest.raises(NoVariantMemory):
            await engine.prepare(fused)
        engine.drop(rounded)
        assert engine.variants() == {REFERENCE}, "no session that opens now may choose it"
        await engine.prepare(fused)
        assert engine.variants() == {REFERENCE, fused}
        assert await decode([engine], PROMPT, COUNT, variant=fused) == tiny.tokens


async def test_library_that_cannot_be_imported_costs_its_variants_alone(
    make_tiny_model: MakeTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model("llama")
    break_library("onnxruntime", tmp_path, monkeypatch)
    async with start_worker(tiny.source(WHOLE), WHOLE, replace(OPTIONS, device="cpu")) as engine:
        await start(engine, session(1), 40)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"^node.engine.backends.onnx cannot be imported: .* refused$") as why:
                await engine.prepare(Variant("onnxruntime", "fp32"))
            assert not isinstance(why.value, EngineCrashed)
        assert tokens_from_tensor(await step([engine], session(1), 0, PROMPT, 1)) == tiny.tokens[:1]
        await engine.prepare(Variant("fused", "fp32"))
        assert engine.variants() == {REFERENCE, Variant("fused", "fp32")}


async def test_idle_reference_is_unloaded_and_loaded_again(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "UNLOAD_AFTER_S", 0.0)
    monkeypatch.setattr(client, "UNLOAD_ROUND_S", 0.01)
    tiny, fused = make_tiny_model("llama"), Variant("fused", "fp32")
    posted: list[str] = []
    encode = worker_protocol.encode_frame

    def note(header: Header, tensors: Sequence[Tensor] = ()) -> list[Buffer]:
        posted.append(header["do"])
        return encode(header, tensors)

    monkeypatch.setattr(worker_protocol, "encode_frame", note)
    async with start_worker(tiny.source(WHOLE), WHOLE, replace(OPTIONS, device="cpu")) as engine:
        assert await decode([engine], PROMPT, COUNT) == tiny.tokens
        assert "unload" not in posted, "nothing else can serve"
        await engine.prepare(fused)
        await start(engine, session(1), 40)
        posted.clear()
        await trio.sleep(0.1)
        assert "unload" not in posted, "a session is on it"
        await engine.close(session(1))
        for _ in range(2):
            with trio.fail_after(10):
                while posted[-1:] != ["unload"]:
                    await trio.sleep(0.01)
            assert engine.variants() == {REFERENCE, fused}
            posted.clear()
            assert await decode([engine], PROMPT, COUNT, variant=fused) == tiny.tokens
            assert "prepare" not in posted
            assert await decode([engine], PROMPT, COUNT) == tiny.tokens
            assert "prepare" in posted


async def test_what_was_loaded_for_a_session_that_ended_meanwhile_is_unloaded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = fake_span_info(WHOLE, block_count=BLOCKS)
    options = SessionOptions(variant=REFERENCE, sampling=replace(GREEDY, json_schema="{}"))
    engine = WorkerEngine(cast("Any", None), info, frozenset({REFERENCE, Variant("fused", "fp32")}))
    posted: list[Header] = []

    def note(header: Header) -> list[Buffer]:
        posted.append(header)
        return []

    monkeypatch.setattr(worker_protocol, "encode_frame", note)

    async def begin_until_cut_off(number: int) -> None:
        await engine.open(session(number), 10)
        with trio.move_on_after(1):
            await engine.begin(session(number), options)
        await engine.close(session(number))

    def answer(call: int) -> None:
        engine._answer({"do": "answer", "did": "ready", "call": call}, memoryview(b""))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.unload_loop)
        await begin_until_cut_off(1)
        answer(0)
        nursery.start_soon(begin_until_cut_off, 2)  # it finds the reference loaded, and waits for the constraints
        await trio.sleep(0.5)
        await engine.close(session(2))
        await trio.sleep(1)
        answer(1)
        with trio.move_on_after(0):
            await engine.begin(session(3), options)  # closed already, and cut off
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert [header["do"] for header in posted] == ["prepare", "constrain", "unload", "unconstrain"]


async def test_idle_node_gives_up_cached_prompts_that_are_not_asked_again(
    make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "UNLOAD_AFTER_S", 0.0)
    monkeypatch.setattr(client, "UNLOAD_ROUND_S", 0.01)
    monkeypatch.setattr(client, "EXPIRY_ROUND_S", 0.05)
    tiny, text = make_tiny_model("llama"), [number % 97 for number in range(2 * PAGE_POSITIONS)]
    given_up: list[int] = []
    encode = worker_protocol.encode_frame

    def note(header: Header, tensors: Sequence[Tensor] = ()) -> list[Buffer]:
        if header["do"] == "trim":
            given_up.extend(header["dropped"])
        return encode(header, tensors)

    monkeypatch.setattr(worker_protocol, "encode_frame", note)
    async with start_worker(tiny.source(WHOLE), WHOLE, OPTIONS) as engine:
        await engine.open(session(1), len(text) + 1, pages_of(text))
        await engine.begin(session(1), SessionOptions(variant=REFERENCE, sampling=GREEDY))
        await engine.step([rows(1, 0, text)])
        await engine.close(session(1))
        assert engine.statistics().cached_positions == len(text)
        with trio.fail_after(TIMEOUT_S):
            while len(given_up) < 3:
                await trio.sleep(0.01)
        assert (sorted(given_up), engine.statistics().cached_positions) == ([0, 1, 2], 0)
        assert await decode([engine], PROMPT, COUNT) == tiny.tokens


def ascii_tokenizer() -> str:
    """Return a tokenizer of single characters, within the vocabulary of the tiny models."""
    characters = ["\u0120", *map(chr, range(0x21, 0x7F))]
    tokenizer = tokenizers.Tokenizer(models.BPE({text: number for number, text in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    definition: str = tokenizer.to_str()
    return definition


async def test_what_schemas_need_is_started_beside_the_steps_and_ends_when_idle(
    make_tiny_model: MakeTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "UNLOAD_AFTER_S", 0.0)
    monkeypatch.setattr(client, "UNLOAD_ROUND_S", 0.0)  # also while a session begins
    tiny, file = make_tiny_model("llama"), tmp_path / "tokenizer.json"
    file.write_text(ascii_tokenizer())
    end = VOCABULARY - 1
    options = SessionOptions(
        variant=REFERENCE,
        sampling=Sampling(max_tokens=9, stop_tokens=(end,), json_schema='{"const": 7}', prompt_length=len(PROMPT)),
    )
    async with start_worker(replace(tiny.source(WHOLE), tokenizer_file=file), WHOLE, OPTIONS) as engine:
        await decode([engine], PROMPT, COUNT)  # the reference is loaded
        worker = psutil.Process(engine.statistics().worker_pid)
        async with trio.open_nursery() as nursery:
            await engine.open(session(1), 20)
            nursery.start_soon(engine.begin, session(1), options)
            with trio.fail_after(TIMEOUT_S):
                while not (helpers := worker.children()):
                    await trio.sleep(0.001)
                helpers[0].suspend()
                assert await decode([engine], PROMPT, COUNT) == tiny.tokens
            helpers[0].resume()
        first = await engine.step([replace(rows(1, 0, PROMPT), history=PROMPT)])
        assert tokens_from_tensor(first.outputs[0].tensor) == [ord("7") - 0x20]
        then = await engine.step([rows(1, len(PROMPT), [ord("7") - 0x20])])
        assert tokens_from_tensor(then.outputs[0].tensor) == [end]
        await engine.close(session(1))
        with trio.fail_after(TIMEOUT_S):
            while worker.children():
                await trio.sleep(0.01)


async def test_session_that_no_schema_can_bind_does_not_begin(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    tiny, file = make_tiny_model("llama"), tmp_path / "tokenizer.json"
    options = SessionOptions(
        variant=REFERENCE, sampling=Sampling(max_tokens=9, json_schema='{"const": 7}', prompt_length=len(PROMPT))
    )
    async with start_worker(replace(tiny.source(WHOLE), tokenizer_file=file), WHOLE, OPTIONS) as engine:
        await engine.open(session(1), 20)
        with pytest.raises(EngineError, match="lacks the model's tokenizer"):
            await engine.begin(session(1), options)
        file.write_text("{}")
        await engine.open(session(1), 20)
        with pytest.raises(BadRequest, match="its tokenizer cannot be read"):
            await engine.begin(session(1), options)
        assert engine.statistics().reserved_positions == 0


async def test_frames_of_any_size_arrive_whole_and_in_order() -> None:
    sizes = (0, 3, READ_AHEAD_BYTES - 20, READ_AHEAD_BYTES, 1, 1 << 20, 5, 0)
    tensors = [Tensor(DType.INT32, (size,), bytes([number]) * 4 * size) for number, size in enumerate(sizes)]
    ours, theirs = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    process = WorkerProcess(ours, cast("Child", None))

    async def send() -> None:
        buffers = [worker_protocol.encode_frame({"number": n}, [each]) for n, each in enumerate(tensors)]
        await trio.SocketStream(theirs).send_all(b"".join(map(bytes, itertools.chain(*buffers))))
        theirs.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for number, tensor in enumerate(tensors):
            header, payload = await process.receive()
            assert (header["number"], bytes(payload)) == (number, bytes(tensor.data))
        with pytest.raises(WorkerExited):
            await process.receive()
    ours.close()


class LostShard:
    """Its engine has lost what its sessions held."""

    def trim(self, dropped: Sequence[int], *, idle: bool) -> NoReturn:
        raise EngineLost(f"lost {dropped}")


def test_worker_whose_engine_is_lost_while_it_is_idle_exits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exited: list[int] = []
    monkeypatch.setattr(os, "_exit", exited.append)
    worker._do_unanswered(cast("Shard[Any]", LostShard()), {"do": "trim", "dropped": [7], "idle": True})
    assert exited == [1]
    assert capsys.readouterr().err == "lost [7]\n"
