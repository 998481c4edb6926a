import random

import pytest

from node.network.interface import NetworkError
from node.swarm.dht_records import RecordKinds
from node.testing.memory_network import MemoryNetworkHub
from tests.support.capabilities import peer_of


async def test_each_record_kind_has_its_own_validator() -> None:
    network = MemoryNetworkHub(random.Random(0)).network(peer_of(1))
    seen: list[tuple[str, bytes]] = []

    def taken(key: str, value: bytes) -> bool:
        seen.append((key, value))
        return True

    kinds = RecordKinds(network)
    kinds.register("taken", taken)
    kinds.register("refused", lambda key, value: False)
    async with network.running():
        await network.put_record("/metaswarm/taken/of/somebody", b"value")
        assert await network.get_record("/metaswarm/taken/of/somebody") == b"value"
        for key in ("/metaswarm/refused/x", "/metaswarm/unheard/x", "/metaswarm/taken", "/metaswarm"):
            with pytest.raises(NetworkError):
                await network.put_record(key, b"value")
    assert set(seen) == {("/metaswarm/taken/of/somebody", b"value")}


def test_registering_a_record_kind_twice_is_an_error() -> None:
    kinds = RecordKinds(MemoryNetworkHub(random.Random(0)).network(peer_of(1)))
    kinds.register("cap", lambda key, value: True)
    with pytest.raises(ValueError, match="registered already"):
        kinds.register("cap", lambda key, value: True)
