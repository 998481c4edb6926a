"""A swarm of real daemons gives, token for token, what its package gives on one machine alone.

For a safetensors package that is what transformers gives in fp32, for a GGUF package what llama.cpp gives.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trio
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from node.models.gguf_file import read_gguf
from node.models.store import Package
from tests.process.daemons import MODEL, THIRDS, Daemon
from tests.support.demo_model import DEQUANTISED, demo_gguf
from tests.support.tokenizers import load_tokenizer
from tests.unit.engine.llamacpp.packages import GgufFiles

NEW_TOKENS = 12
TEXT = (
    "The committee met on a rainy Thursday. Its chairman, a retired engineer of bridges, began with the minutes of "
    "the last meeting, in which nothing had been decided, and went on to the matter of the clock tower. "
)
PROMPTS = (
    "The",
    "Hello world",
    "What is the capital of France?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Привет, мир! 你好 世界 🌍",
    TEXT,
    TEXT * 5,
    TEXT * 17,
)
"""From 1 to about 700 tokens."""

StartSwarm = Callable[..., Awaitable[list[Daemon]]]


@pytest.fixture(scope="module")
def expected(dequantised: Package) -> list[tuple[list[int], list[int]]]:
    """For each prompt its token ids, and those that transformers generates greedily after it."""
    model = whole_model(dequantised.path, dict(dequantised.manifest.config))
    tokenizer = load_tokenizer(dequantised)
    return [(prompt := tokenizer.encode(text), generate(model, prompt)) for text in PROMPTS]


def whole_model(folder: Path, config: dict[str, Any]) -> Any:
    """Load the model undivided, by transformers alone."""
    with init_empty_weights(include_buffers=False):  # to draw weights at random would take most of the time
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
    model.tie_weights()
    return model.eval()


def generate(model: Any, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_prompts_are_short_and_long(expected: list[tuple[list[int], list[int]]]) -> None:
    lengths = [len(prompt) for prompt, _ in expected]
    assert min(lengths) == 1
    assert 600 <= max(lengths) <= 800


async def test_greedy_tokens_equal_transformers_over_three_stages(
    start_swarm: StartSwarm, expected: list[tuple[list[int], list[int]]]
) -> None:
    await check(await start_swarm(*THIRDS, model=DEQUANTISED), expected, DEQUANTISED)


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param(("0-30",), id="1 stage"),
        # They have no kind of stage that one and three have not: the whole model, its head, its middle, its tail.
        pytest.param(("0-15", "15-30"), id="2 stages", marks=pytest.mark.soak),
        pytest.param(("0-7", "7-15", "15-22", "22-30"), id="4 stages", marks=pytest.mark.soak),
    ],
)
async def test_greedy_tokens_equal_transformers(
    start_swarm: StartSwarm, expected: list[tuple[list[int], list[int]]], spans: tuple[str, ...]
) -> None:
    # All prompts pass through three stages; where else the model is cut, only some of them, the longest among them.
    await check(await start_swarm(*spans, model=DEQUANTISED), expected[::-3], DEQUANTISED)


@pytest.fixture(scope="module")
def expected_of_llama_cpp(package: Package) -> list[tuple[list[int], list[int]]]:
    """For each prompt its token ids, and those that llama.cpp generates greedily after it, alone on the whole file."""
    tokenizer, alone = load_tokenizer(package), GgufFiles(read_gguf(demo_gguf()), package.path).alone()
    return [(prompt := tokenizer.encode(text), alone.decode(prompt, NEW_TOKENS)) for text in PROMPTS]


@pytest.mark.parametrize(
    "spans",
    [
        # Three stages have all kinds of stage but the whole model, whose parity tests/unit/engine/llamacpp shows.
        pytest.param(("0-30",), id="1 stage", marks=pytest.mark.soak),
        pytest.param(("0-15", "15-30"), id="2 stages", marks=pytest.mark.soak),
        pytest.param(THIRDS, id="3 stages"),
    ],
)
async def test_greedy_tokens_equal_llama_cpp_also_for_all_prompts_at_once(
    start_swarm: StartSwarm, expected_of_llama_cpp: list[tuple[list[int], list[int]]], spans: tuple[str, ...]
) -> None:
    daemons = await start_swarm(*spans)
    await check(daemons, expected_of_llama_cpp, MODEL)
    async with trio.open_nursery() as nursery:
        for each in expected_of_llama_cpp:
            nursery.start_soon(check, daemons, [each], MODEL)
    for daemon in daemons:
        check_maps_no_torch(daemon)


def check_maps_no_torch(daemon: Daemon) -> None:
    """Check all processes of a daemon but the one that measures the hardware, which ends by itself."""
    node = psutil.Process(daemon.process.pid)
    serving = {}
    for process in (node, *node.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            if "node.engine.benchmark" not in process.cmdline():
                serving[" ".join(process.cmdline())] = Path(f"/proc/{process.pid}/maps").read_text()
    assert any("node.engine.worker" in command and "xllamacpp" in maps for command, maps in serving.items())
    assert [command for command, maps in serving.items() if "libtorch" in maps] == []


async def check(daemons: list[Daemon], expected: list[tuple[list[int], list[int]]], model: str) -> None:
    """Submit prompts; every peer of the swarm takes its turn as the coordinator."""
    for number, (prompt, tokens) in enumerate(expected):
        daemon = daemons[number % len(daemons)]
        options = {"max_tokens": NEW_TOKENS, "metaswarm": {"ignore_eos": True}}
        answer = await daemon.complete(model=model, prompt=prompt, **options)
        assert answer["metaswarm"]["token_ids"] == tokens
        assert len(answer["metaswarm"]["route"]) == len(daemons)
        assert answer["usage"]["prompt_tokens"] == len(prompt)
