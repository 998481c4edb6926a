"""The prompts of trials: pieces of sample text that share what the workload says, and nothing with other runs."""

import random
from collections.abc import Sequence
from typing import Final

from selector.workloads import TrialWorkload

PHRASE_TOKENS: Final = 24
"""Length of the phrase that a repetitive prompt repeats."""
NONCE_TOKENS: Final = 12
"""Random tokens at the start of a prompt, so that no run finds another's pages in the prefix cache."""


def shared_tokens(workload: TrialWorkload) -> int:
    """Return the length of the jobs' common prefix."""
    return round(workload.shared_prefix_share * workload.prompt_tokens)


def make_prompts(
    text: Sequence[int], workload: TrialWorkload, rng: random.Random, common: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Return the prompts of one run: pieces of sample text, each with a beginning of its own behind the common prefix.

    The end of each repeats a phrase, as far as the workload says. `common`: where other runs have the same prefix.
    """
    common = piece(text, shared_tokens(workload), rng) if common is None else common
    own = workload.prompt_tokens - len(common)
    repeated = min(own, round(workload.repetitiveness * workload.prompt_tokens))
    prompts: list[tuple[int, ...]] = []
    for _ in range(workload.concurrency):
        phrase = _anywhere(text, PHRASE_TOKENS, rng)
        again = (phrase * (repeated // PHRASE_TOKENS + 1))[:repeated]
        prompts.append((*common, *piece(text, own - repeated, rng), *again))
    return prompts


def piece(text: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Return `count` tokens of text from a random place, begun with a random nonce."""
    nonce = [rng.choice(text) for _ in range(min(count, NONCE_TOKENS))]
    return [*nonce, *_anywhere(text, count - len(nonce), rng)]


def _anywhere(text: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Return `count` tokens of text from a random place, wrapping around at its end."""
    start = rng.randrange(len(text))
    return [text[(start + offset) % len(text)] for offset in range(count)]
