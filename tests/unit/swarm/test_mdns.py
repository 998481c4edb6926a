"""What is said on the local network, and what is made of what others say there."""

from node.swarm.mdns import addresses_in, interfaces_of, service_type

PEER = "12D3KooWM4xHiz2GDU4ebDMhPcxVNBm7kzyPWh7w4Y7b9rARdaL8"


def test_private_swarm_has_its_own_valid_service_name() -> None:
    kinds = {service_type(None), service_type("a" * 64), service_type("b" * 64)}
    assert len(kinds) == 3
    for kind in kinds:
        name, udp, domain = kind.split(".")[:3]
        assert (udp, domain) == ("_udp", "local")
        assert len(name.removeprefix("_")) <= 15
        assert "aaaa" not in name


def test_service_is_registered_on_dialable_interfaces_only() -> None:
    here = [f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}", f"/ip6/fe80::1/tcp/4001/p2p/{PEER}"]
    own = {"127.0.0.1", "fe80::1", "192.0.2.7"}
    assert interfaces_of(here, own) == {"127.0.0.1"}
    assert interfaces_of([*here, f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"], own) == {"127.0.0.1", "192.0.2.7"}


def test_service_is_not_registered_on_forwarded_addresses_nor_on_those_of_relays() -> None:
    forwarded = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"
    named = f"/dns4/example.org/tcp/4001/p2p/{PEER}"
    circuit = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
    assert interfaces_of([forwarded, named, circuit], {"192.0.2.7"}) == set()


def test_txt_record_yields_a_bounded_number_of_peer_addresses() -> None:
    address = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}".encode()
    assert addresses_in({b"dnsaddr": address, b"dnsaddr1": None, b"other": address, b"dnsaddr2": b"\xff"}) == [
        address.decode()
    ]
    assert len(addresses_in({f"dnsaddr{number}".encode(): address for number in range(1000)})) == 16
