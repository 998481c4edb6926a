"""Stages that are killed in the middle of a job: the text is that of the undisturbed run."""

import signal
from pathlib import Path

import pytest

from node.models.store import Package
from tests.process.failover import spared_swarm

PROMPT = "Once upon a time there was"
TOKENS = 40


async def test_the_text_is_the_same_whichever_stage_is_killed(package: Package, tmp_path: Path) -> None:
    async with spared_swarm(tmp_path) as swarm:
        undisturbed = await swarm.run(PROMPT, TOKENS)
        # The last with enough tokens to come that the job cannot end before the signal does.
        for stage, position, how in ((0, 1, signal.SIGKILL), (1, 17, signal.SIGSTOP), (2, 28, signal.SIGKILL)):
            outcome = await swarm.run(PROMPT, TOKENS, lose=(stage, position, how))
            assert outcome.text == undisturbed.text
            assert outcome.replays == 1


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_the_text_is_the_same_wherever_a_stage_is_killed(package: Package, tmp_path: Path) -> None:
    async with spared_swarm(tmp_path) as swarm:
        undisturbed = await swarm.run(PROMPT, TOKENS)
        for position in range(1, TOKENS):
            for stage in range(3):
                outcome = await swarm.run(PROMPT, TOKENS, lose=(stage, position, signal.SIGKILL))
                assert outcome.text == undisturbed.text, (position, stage)
            await swarm.replenish()
