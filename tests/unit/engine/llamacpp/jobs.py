"""Greedy texts over spans in all the ways that share or repeat work: none may change a token."""

from collections.abc import Sequence
from dataclasses import replace

from node.engine.interface import Prefix, SessionOptions, SliceInput
from node.engine.llamacpp.shard import LLAMACPP
from protocol.identity import SessionId
from protocol.tensors import Tensor, join, tensor_from_tokens, tokens_from_tensor
from tests.unit.engine.driving import GREEDY, InProcess, session, start, step

REPLAYED_EVERY = 10
WRONG_DRAFTS = (101, 102)


async def step_all(cut: Sequence[InProcess], slices: Sequence[SliceInput]) -> list[list[int]]:
    """Take rows of several sessions through all spans in common steps; return the tokens that each draws."""
    rows: list[Tensor] = [each.tensor for each in slices]
    for engine in cut:
        result = await engine.step([replace(each, tensor=given) for each, given in zip(slices, rows, strict=True)])
        assert not result.faults
        rows = [output.tensor for output in result.outputs]
    return [tokens_from_tensor(each) for each in rows]


async def decode_together(cut: Sequence[InProcess], prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Continue prompts of any lengths, all in the same steps."""
    sessions = [session(number) for number in range(len(prompts))]
    for of, prompt in zip(sessions, prompts, strict=True):
        for engine in cut:
            await start(engine, of, len(prompt) + count, variant=LLAMACPP)
    found: list[list[int]] = [[] for _ in prompts]
    given = [SliceInput(of, 0, tensor_from_tokens(text), 1) for of, text in zip(sessions, prompts, strict=True)]
    for _ in range(count):
        for text, tokens in zip(found, await step_all(cut, given), strict=True):
            text += tokens
        given = [
            SliceInput(of, len(prompt) + len(text) - 1, tensor_from_tokens(text[-1:]), 1)
            for of, prompt, text in zip(sessions, prompts, found, strict=True)
        ]
    for of in sessions:
        for engine in cut:
            await engine.close(of)
    return found


async def decode_cached(
    cut: Sequence[InProcess], of: SessionId, prompt: Sequence[int], count: int
) -> tuple[int, list[int]]:
    """Decode with the prefix cache; return how many positions of the prompt were found in it."""
    hashes = b"".join(bytes(str(prompt[: end + 32]).encode()[-16:].rjust(16)) for end in range(0, len(prompt) - 31, 32))
    hits = []
    for engine in cut:
        await engine.open(of, len(prompt) + count, Prefix(namespace="peer", hashes=hashes))
        sampling = GREEDY if engine.info.is_last else None
        hits.append(await engine.begin(of, SessionOptions(sampling=sampling, variant=LLAMACPP)))
    cached = min(*hits, len(prompt) - 1)
    tokens = tokens_from_tensor(await step(cut, of, cached, prompt[cached:], 1))
    while len(tokens) < count:
        tokens += tokens_from_tensor(await step(cut, of, len(prompt) + len(tokens) - 1, tokens[-1:], 1))
    for engine in cut:
        await engine.close(of)
    return cached, tokens


async def decode_drafted(
    cut: Sequence[InProcess], of: SessionId, prompt: Sequence[int], wanted: Sequence[int], *, may_differ: bool = False
) -> list[int]:
    """Decode with drafts, the first of which is right unless the text may differ, and the others are wrong."""
    for engine in cut:
        await start(engine, of, len(prompt) + len(wanted) + 4, variant=LLAMACPP)
    tokens = tokens_from_tensor(await step(cut, of, 0, prompt, 1))
    while len(tokens) < len(wanted):
        known = len(prompt) + len(tokens) - 1
        right = wanted[len(tokens) : len(tokens) + 1]
        drafts = (*right, *WRONG_DRAFTS)
        drawn = tokens_from_tensor(await step(cut, of, known, [tokens[-1], *drafts], 1 + len(drafts), drafts=drafts))
        assert may_differ or len(drawn) == len(right) + 1
        tokens += drawn
    for engine in cut:
        await engine.close(of)
    return tokens[: len(wanted)]


async def decode_replayed(cut: Sequence[InProcess], of: SessionId, prompt: Sequence[int], count: int) -> list[int]:
    """Decode while at every tenth token one stage after another is lost, and gets all its rows again in one step."""
    kept: list[list[Tensor]] = [[] for _ in cut]
    for engine in cut:
        await start(engine, of, len(prompt) + count, variant=LLAMACPP)
    tokens: list[int] = []
    given, position = tensor_from_tokens(prompt), 0
    while len(tokens) < count:
        if tokens and len(tokens) % REPLAYED_EVERY == 0:
            lost = len(tokens) // REPLAYED_EVERY % len(cut)
            cut[lost].close_now(of, keep=False)
            await start(cut[lost], of, len(prompt) + count, variant=LLAMACPP)
            await cut[lost].step([SliceInput(of, 0, join(kept[lost]), 0)])
        rows = given
        for engine, held in zip(cut, kept, strict=True):
            held.append(rows)
            [output] = (await engine.step([SliceInput(of, position, rows, 1)])).outputs
            rows = output.tensor
        tokens += tokens_from_tensor(rows)
        given, position = tensor_from_tokens(tokens[-1:]), len(prompt) + len(tokens) - 1
    for engine in cut:
        await engine.close(of)
    return tokens
