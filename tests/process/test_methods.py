"""Every exact method over real daemons gives the tokens of the reference, also for eight jobs at a time."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import trio

from node.models.gguf_file import read_gguf
from node.models.store import Package
from selector.task import BASELINES, PORTFOLIO, Method, PackageFormat, parse_method, portfolio
from tests.process.daemons import MODEL, THIRDS, Daemon, until
from tests.process.test_parity import TEXT, generate, whole_model
from tests.support.demo_model import DEQUANTISED, demo_gguf
from tests.support.tokenizers import load_tokenizer
from tests.unit.engine.llamacpp.packages import GgufFiles

StartSwarm = Callable[..., Awaitable[list[Daemon]]]

NEW_TOKENS = 6
ALONE_TOKENS = 12
TRIES = 5
"""In one of them a draft arrives in time, however busy the machine."""
PROMPTS = (
    "The",
    "What is the capital of France?",
    TEXT,
    "one two three four five one two three four five one two three",
    *(TEXT * 3 + end for end in ("Then he said", "Nobody spoke.", "The minutes of", "In 1911 the")),
)
"""Mixed lengths, from one token to about 130; half of them begin alike, and one repeats itself."""

EXACT = {each: [method.name for method in portfolio(each) if method.exact] for each in ("safetensors", "gguf")}


@pytest.mark.parametrize("package_format", EXACT)
def test_every_switch_value_of_an_exact_method_is_tested(package_format: str) -> None:
    """Also in what `make test` runs."""
    assert len(EXACT[package_format]) >= 6
    tested = {item for name in combined_methods(package_format) for item in PORTFOLIO[name].switches.items()}
    assert tested == {item for name in EXACT[package_format] for item in PORTFOLIO[name].switches.items()}


def combined_methods(package_format: str) -> list[str]:
    """Of each engine with each way of speculating, the method with most of what is optional; and the reference."""
    reference = BASELINES[PackageFormat(package_format)]
    most: dict[tuple[str, str], str] = {}
    for name in EXACT[package_format]:
        key = (PORTFOLIO[name].engine, PORTFOLIO[name].drafter)
        most[key] = max(most.get(key, name), name, key=lambda each: _options(PORTFOLIO[each], reference))
    return list(dict.fromkeys([reference.name, *most.values()]))


def _options(method: Method, reference: Method) -> int:
    """How many switches differ from the reference."""
    return sum(value != reference.switches[switch] for switch, value in method.switches.items())


@pytest.fixture(scope="module")
def expected(dequantised: Package) -> list[tuple[list[int], list[int]]]:
    """For each prompt its token ids, and the greedy continuation by transformers."""
    model = whole_model(dequantised.path, dict(dequantised.manifest.config))
    tokenizer = load_tokenizer(dequantised)
    return [(prompt := tokenizer.encode(text), generate(model, prompt)) for text in PROMPTS]


@pytest.mark.timeout(900)  # each of the engines is first built and warmed by every stage
async def test_exact_methods_equal_transformers_alone_and_in_batches_of_eight(
    start_swarm: StartSwarm, expected: list[tuple[list[int], list[int]]]
) -> None:
    daemons = await start_swarm(*THIRDS, flags=("--draft", DEQUANTISED), model=DEQUANTISED)
    await check_methods(daemons, expected, combined_methods("safetensors"), DEQUANTISED)


async def test_exact_methods_of_gguf_equal_llama_cpp_alone_and_in_batches_of_eight(
    start_swarm: StartSwarm, package: Package
) -> None:
    tokenizer, alone = load_tokenizer(package), GgufFiles(read_gguf(demo_gguf()), package.path).alone()
    expected = [(prompt := tokenizer.encode(text), alone.decode(prompt, ALONE_TOKENS)) for text in PROMPTS]
    daemons = await start_swarm(*THIRDS, flags=("--draft", MODEL))
    await check_methods(daemons, expected, combined_methods("gguf"), MODEL)


@pytest.mark.soak  # the measurement runs at the lowest priority: minutes on a busy machine
@pytest.mark.timeout(900)
async def test_keys_and_values_in_q8_0_serve_near_jobs_once_measured_and_never_exact_ones(
    start_swarm: StartSwarm,
) -> None:
    [daemon] = await start_swarm("0-30")
    name = parse_method("kv=q8_0|prefix_cache=on", "gguf").name
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": NEW_TOKENS}
    refused = await daemon.complete(**body, metaswarm={"method": name})
    assert "is not exact: use --quality" in refused["error"]["message"]
    answer: dict[str, Any] = {}

    async def is_served() -> bool:
        nonlocal answer
        answer = await daemon.complete(**body, metaswarm={"method": name, "quality": "near"})
        return answer.get("error", {}).get("code") not in {"quality_being_measured", "method_not_ready", "peers_full"}

    await until(is_served, timeout_s=800)
    assert answer["metaswarm"]["method"]["name"] == name
    [model] = [each for each in (await daemon.get("/swarm/models"))["models"] if each["quality"]]
    figures = model["quality"]["llamacpp/native/q8_0/fp32"]
    assert 0 < figures["mean_kl"] < 0.02
    assert abs(figures["perplexity_change"]) < 0.01
    exact = await daemon.complete(**body, metaswarm={})
    assert "kv=" not in exact["metaswarm"]["method"]["name"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("spans", [("0-15", "15-30"), THIRDS], ids=["2 stages", "3 stages"])
async def test_every_exact_method_equals_transformers(
    start_swarm: StartSwarm, expected: list[tuple[list[int], list[int]]], spans: tuple[str, ...]
) -> None:
    daemons = await start_swarm(*spans, flags=("--draft", DEQUANTISED), model=DEQUANTISED)
    await check_methods(daemons, expected, EXACT["safetensors"], DEQUANTISED)


async def check_methods(
    daemons: list[Daemon], expected: list[tuple[list[int], list[int]]], methods: Sequence[str], model: str
) -> None:
    async def check(name: str, number: int, count: int) -> int:
        """Compare a job's text; return the number of accepted draft tokens."""
        prompt, tokens = expected[number]
        answer = await _complete(daemons[0], model, name, prompt, count)
        told = answer["metaswarm"]
        assert told["token_ids"] == tokens[:count], name
        assert told["method"]["name"] == name
        assert len(told["route"]) == len(daemons)
        return int(answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"])

    for name in methods:
        # Alone first: builds the variant on every stage, and drafts come in time.
        for _ in range(TRIES):
            if await check(name, 1, ALONE_TOKENS) or "speculation=draft" not in name:
                break
        else:
            pytest.fail(f"no draft token was accepted in {TRIES} jobs with {name}")
        async with trio.open_nursery() as nursery:
            for number in range(len(expected)):
                nursery.start_soon(check, name, number, NEW_TOKENS)


async def _complete(daemon: Daemon, model: str, method: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """Submit a job, with retries while a variant is being built or a peer is starved."""
    answer: dict[str, Any] = {}

    async def is_accepted() -> bool:
        nonlocal answer
        options = {"ignore_eos": True, "method": method}
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "metaswarm": options}
        answer = await daemon.complete(**body)
        return answer.get("error", {}).get("code") not in {"blocks_not_served", "method_not_ready", "peers_full"}

    await until(is_accepted, timeout_s=200)
    return answer
