"""The pool of job links: one link to each peer, for all jobs."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import trio
from trio.testing import MockClock

from node.identity import Identity
from node.links.base_link import LinkBroken
from node.links.link_pool import REPLACED_IDLE_S, LinkPool
from node.links.outbound_link import SessionLost
from node.network.interface import NetworkError
from node.testing.memory_network import MemoryNetworkHub
from protocol.identity import JobId, PeerId, SessionId


@asynccontextmanager
async def two_pools() -> AsyncIterator[tuple[LinkPool, LinkPool]]:
    """The pools of two peers that are connected."""
    hub = MemoryNetworkHub(random.Random(0))
    networks = [hub.network(Identity(key * 32).peer_id) for key in (b"1", b"2")]
    near, far = (LinkPool(network, "test/1", Mock()) for network in networks)
    async with networks[0].running(), networks[1].running(), near.running(), far.running():
        await networks[0].connect(networks[1].multiaddrs[0])
        yield near, far


async def test_peer_is_dialled_once_also_where_a_task_that_waited_for_it_was_cancelled(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_pools() as (near, far):
        open_stream = near._network.open_stream

        async def slow(*arguments: Any) -> Any:
            await trio.sleep(2)
            return await open_stream(*arguments)

        monkeypatch.setattr(near._network, "open_stream", slow)

        async def job(delay_s: float, limit_s: float) -> None:
            await trio.sleep(delay_s)
            with trio.move_on_after(limit_s):
                await near.link_to(far.peer_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(job, 0.0, 10.0)
            nursery.start_soon(job, 0.1, 0.5)
            nursery.start_soon(job, 1.0, 10.0)
        assert near.counts() == (1, 0)
        assert far.counts() == (0, 1), "every link more is one until the peer refuses any"
        assert not near._dialling


async def test_replaced_relay_link_is_kept_for_a_session_whose_first_rows_take_a_while(
    virtual_clock: MockClock,
) -> None:
    async with two_pools() as (near, far):
        relayed = await near.link_to(far.peer_id)
        lost: list[SessionLost] = []
        unwatch = relayed.watch(SessionId(JobId("00" * 16), 1), lost.append)
        relayed._stream.relay = PeerId("relay")  # type: ignore[misc]  # the connection beside it is direct
        assert near.is_linked(far.peer_id), "until there is another"
        assert await near.link_to(far.peer_id) is not relayed
        await trio.sleep(2 * REPLACED_IDLE_S)
        assert (lost, relayed.broken) == ([], None)
        unwatch()
        await trio.sleep(2 * REPLACED_IDLE_S)
        assert relayed.broken


async def test_relayed_link_is_kept_until_a_direct_one_can_be_opened(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer whose connection is about to become direct is alive."""
    async with two_pools() as (near, far):
        relayed = await near.link_to(far.peer_id)
        relayed._stream.relay = PeerId("relay")  # type: ignore[misc]  # the connection beside it is direct
        monkeypatch.setattr(near._network, "open_stream", Mock(side_effect=NetworkError("not yet")))
        with pytest.raises(LinkBroken):
            await near.link_to(far.peer_id)
        await trio.sleep(2 * REPLACED_IDLE_S)
        assert near.is_linked(far.peer_id)
        assert not relayed.broken
