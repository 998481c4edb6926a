"""The canary of virtual time: without the private switch of trio's scheduler these programs differ from run to run."""

import trio

from tests.simulation import virtual_time


def order_of_waking(seed: int) -> list[int]:
    woken: list[int] = []

    async def wait(number: int, bell: trio.Event) -> None:
        await bell.wait()
        for _ in range(3):
            woken.append(number)
            await trio.lowlevel.checkpoint()

    async def program() -> None:
        bell = trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(wait, number, bell)
            await trio.sleep(1)
            bell.set()

    virtual_time.run(program, seed=seed)
    return woken


def test_same_seed_gives_same_order() -> None:
    orders = [order_of_waking(seed=7) for _ in range(5)]
    assert all(order == orders[0] for order in orders)


def test_task_order_depends_on_seed() -> None:
    assert order_of_waking(seed=7) != order_of_waking(seed=8)


def test_hour_of_sleep_is_skipped() -> None:
    async def program() -> float:
        await trio.sleep(3600)
        return trio.current_time()

    assert virtual_time.run(program, seed=0) >= 3600
