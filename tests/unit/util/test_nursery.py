import pytest
import trio
import trio.testing

from node.util.nursery import background_nursery


async def test_background_tasks_are_cancelled_at_the_end_of_the_block() -> None:
    cancelled = trio.Event()

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with background_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
    assert cancelled.is_set()


async def test_exception_of_the_block_is_not_grouped() -> None:
    async def run() -> None:
        async with background_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise ValueError("bare")

    with pytest.raises(ValueError, match="bare"):
        await run()


async def test_failing_background_task_cancels_the_block() -> None:
    async def fail() -> None:
        raise KeyError

    with pytest.RaisesGroup(KeyError):
        async with background_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()
