"""Many prompts at a time. Where peers are full, the client waits and tries again, as the node tells it."""

import asyncio

from metaswarm_client import Answer, AsyncSwarm

PROMPTS = [f"Write one sentence about the number {number}." for number in range(1, 9)]
AT_A_TIME = 4


async def main() -> None:
    """Answer all prompts; with trio, a nursery and `trio.run` do the same."""
    answers: dict[str, Answer] = {}
    slots = asyncio.Semaphore(AT_A_TIME)

    async def ask(prompt: str) -> None:
        async with slots:
            answers[prompt] = await swarm.chat(prompt, max_tokens=16, temperature=0)

    async with AsyncSwarm(retry_limit_s=300) as swarm, asyncio.TaskGroup() as tasks:
        for prompt in PROMPTS:
            tasks.create_task(ask(prompt))
    for prompt in PROMPTS:
        print(f"{prompt} {answers[prompt].text!r}")


asyncio.run(main())
