"""What a gateway is asked for, and what is made of its answers."""

import json
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest
import trio.testing

from node.network import port_mapping
from node.network.addresses import TcpAddress, parse_address
from node.network.own_addresses import OwnAddresses
from node.network.port_mapping import LEASE_S, change_mapping, keep_port_mapping, main
from node.network.traversal import Traversal, TraversalOptions
from node.util.child_process import ChildError

HOST, PORT = "192.168.1.2", 4001


class Gateway:
    """A gateway as miniupnpc shows it, which may know permanent leases only."""

    def __init__(self, held: dict[int, tuple[str, int]] | None = None, *, permanent_only: bool = False) -> None:
        self.held = held or {}
        self.leases: dict[int, int] = {}
        self._permanent_only = permanent_only

    def externalipaddress(self) -> str:
        return "203.0.113.7"

    def getspecificportmapping(self, port: int, _protocol: str) -> tuple[Any, ...] | None:
        return (*self.held[port], "somebody", True, 0) if port in self.held else None

    def addportmapping(
        self, port: int, _protocol: str, host: str, inner: int, _description: str, _remote: str, lease_s: int
    ) -> None:
        if lease_s and self._permanent_only:
            raise RuntimeError("OnlyPermanentLeasesSupported")
        self.held[port] = (host, inner)
        self.leases[port] = lease_s

    def deleteportmapping(self, port: int, _protocol: str) -> None:
        del self.held[port]


def test_own_port_is_mapped_for_a_while_and_renewed_and_removed() -> None:
    gateway = Gateway()
    for _ in range(2):
        assert change_mapping(gateway, "add", HOST, PORT, PORT) == {"host": "203.0.113.7", "port": PORT, "own": HOST}
    assert gateway.leases == {PORT: LEASE_S}
    change_mapping(gateway, "remove", HOST, PORT, PORT)
    assert gateway.held == {}


def test_port_of_another_node_is_left_alone() -> None:
    others = {PORT: ("192.168.1.3", PORT), PORT + 1: (HOST, 5001)}
    gateway = Gateway(dict(others))
    assert change_mapping(gateway, "add", HOST, PORT, PORT)["port"] == PORT + 2
    change_mapping(gateway, "remove", HOST, PORT, PORT)
    assert others.items() <= gateway.held.items()
    crowded = Gateway({port: ("192.168.1.3", port) for port in range(PORT, PORT + 100)})
    with pytest.raises(RuntimeError, match="no free port"):
        change_mapping(crowded, "add", HOST, PORT, PORT)


def test_gateway_with_permanent_leases_only_gets_one() -> None:
    gateway = Gateway(permanent_only=True)
    change_mapping(gateway, "add", HOST, PORT, PORT)
    assert gateway.leases == {PORT: 0}


_SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
_DESCRIPTION = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion><device>
<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType><serviceList><service>
<serviceType>{_SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>
<controlURL>/control</controlURL><eventSubURL>/event</eventSubURL><SCPDURL>/scpd.xml</SCPDURL>
</service></serviceList></device></deviceList></device></deviceList></device></root>"""
_ANSWERS = {
    "GetStatusInfo": "<NewConnectionStatus>Connected</NewConnectionStatus><NewUptime>1</NewUptime>",
    "GetExternalIPAddress": "<NewExternalIPAddress>9.9.9.9</NewExternalIPAddress>",
    "AddPortMapping": "",
}


class _GatewayServer(BaseHTTPRequestHandler):
    """A gateway that speaks UPnP over HTTP."""

    asked: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:  # the name is the library's
        self._reply(200, _DESCRIPTION)

    def do_POST(self) -> None:
        action = self.headers["SOAPAction"].strip('"').rpartition("#")[2]
        self.asked[action] = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if action not in _ANSWERS:
            self._reply(500, "<s:Envelope><s:Body><s:Fault><errorCode>714</errorCode></s:Fault></s:Body></s:Envelope>")
            return
        body = f'<u:{action}Response xmlns:u="{_SERVICE}">{_ANSWERS[action]}</u:{action}Response>'
        envelope = 's:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"'
        self._reply(200, f"<{envelope}><s:Body>{body}</s:Body></s:Envelope>")

    def _reply(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "text/xml")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.mark.parametrize(("own", "host"), [("127.0.0.1", "127.0.0.1"), (HOST, "10.8.0.2")])
def test_mapping_is_made_at_a_gateway_that_speaks_upnp(own: str, host: str, capsys: pytest.CaptureFixture[str]) -> None:
    """To the address in the gateway's network, of several."""
    with HTTPServer(("127.0.0.1", 0), _GatewayServer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            main(
                [
                    "add",
                    "10.8.0.2," + own,
                    str(PORT),
                    str(PORT),
                    f"http://127.0.0.1:{server.server_port}/description.xml",
                ]
            )
        finally:
            server.shutdown()
    assert json.loads(capsys.readouterr().out) == {"host": "9.9.9.9", "port": PORT, "own": host}
    asked = _GatewayServer.asked["AddPortMapping"]
    for part in (f">{host}<", f">{PORT}<", ">TCP<", f">{LEASE_S}<"):
        assert part in asked


async def mapped_by(monkeypatch: pytest.MonkeyPatch, *answers: str | None) -> list[str | None]:
    """Return what a node takes for its mapped address as a gateway answers, or fails, for ever after the last one."""
    left, taken = list(answers), list[str | None]()

    async def answer(*_: Any, **__: Any) -> str:
        found = left.pop(0) if left else None
        if found is None:
            raise ChildError("no gateway")
        return found

    monkeypatch.setattr(port_mapping, "run", answer)
    own = [parse_address(f"/ip4/{HOST}/tcp/{PORT}")]

    def take(address: TcpAddress | None) -> None:
        taken.append(address.transport if address else None)

    with trio.move_on_after(1.5 * LEASE_S):
        await keep_port_mapping(lambda: own, take)
    return taken


@pytest.mark.parametrize("host", ["evil", "100.64.1.2", "192.168.1.1", "::1", "224.0.0.1", ""])
async def test_gateway_is_believed_no_address_that_is_not_public(
    host: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    assert await mapped_by(monkeypatch, json.dumps({"host": host, "port": PORT, "own": HOST})) == []


async def test_mapping_outlives_a_failed_renewal_but_not_its_lease(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    good = json.dumps({"host": "9.9.9.9", "port": PORT, "own": HOST})
    address = f"/ip4/9.9.9.9/tcp/{PORT}"
    assert await mapped_by(monkeypatch, good, None, good) == [address]
    assert await mapped_by(monkeypatch, good) == [address, None]


class Home:
    """A network with a gateway, by the addresses of this node in it; others have none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = [parse_address(f"/ip4/{HOST}/tcp/{PORT}")]
        self.asked_at_s: list[float] = []
        self.removed: list[Sequence[str]] = []
        self.is_down = False
        monkeypatch.setattr(port_mapping, "run", self._answer)

    async def _answer(self, command: Sequence[str], **_: Any) -> str:
        verb, hosts, *ports = command[-4:]
        if verb == "remove":
            self.removed.append([hosts, *ports])
            return "{}"
        self.asked_at_s.append(trio.current_time())
        await trio.sleep(1)
        if self.is_down or HOST not in hosts:
            raise ChildError("no gateway")
        return json.dumps({"host": "9.9.9.9", "port": PORT, "own": HOST})


async def test_mapping_ends_with_the_network_it_was_made_in_and_returns_with_it(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    home = Home(monkeypatch)
    traversal = Traversal(TraversalOptions(), own := OwnAddresses(), private_swarm=False)
    at_home, mapped = home.own, parse_address(f"/ip4/9.9.9.9/tcp/{PORT}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_port_mapping, lambda: home.own, traversal._on_mapped)
        await trio.sleep(60)
        assert own.mapped == mapped, "at home"
        own.confirmed = [mapped]
        home.own = [parse_address(f"/ip4/10.7.7.7/tcp/{PORT}")]
        await trio.sleep(60)
        assert own.advertised() == []
        home.own = at_home
        await trio.sleep(60)
        assert own.mapped == mapped
        nursery.cancel_scope.cancel()


async def test_mapping_is_renewed_after_a_suspend(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """In which the gateway's clock went on, and only the wall clock here."""
    home, wall_s = Home(monkeypatch), 1_780_000_000.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_port_mapping, lambda: home.own, lambda _: None, lambda: wall_s)
        await trio.sleep(60)
        assert len(home.asked_at_s) == 1
        wall_s += LEASE_S
        await trio.sleep(60)
        assert len(home.asked_at_s) == 2
        nursery.cancel_scope.cancel()


async def test_mapping_outlives_other_addresses_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """As that of a VPN that ends, also where the gateway misses the next question."""
    home, taken = Home(monkeypatch), list[TcpAddress | None]()
    at_home = home.own
    home.own = [parse_address(f"/ip4/10.8.0.2/tcp/{PORT}"), *at_home]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_port_mapping, lambda: home.own, taken.append)
        await trio.sleep(60)
        home.own, home.is_down = at_home, True
        await trio.sleep(15)
        home.is_down = False
        await trio.sleep(60)
        assert taken == [parse_address(f"/ip4/9.9.9.9/tcp/{PORT}")]
        nursery.cancel_scope.cancel()


async def test_gateway_that_is_late_after_a_suspend_is_asked_again_within_a_minute(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    home, taken, ahead_s = Home(monkeypatch), list[TcpAddress | None](), 1_780_000_000.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_port_mapping, lambda: home.own, taken.append, lambda: trio.current_time() + ahead_s)
        await trio.sleep(60)
        ahead_s += 2 * LEASE_S
        home.is_down = True
        await trio.sleep(35)
        home.is_down = False
        await trio.sleep(45)
        assert [each is not None for each in taken] == [True, False, True]
        home.is_down = True
        ahead_s += 2 * LEASE_S
        before = len(home.asked_at_s)
        await trio.sleep(500)
        assert len(home.asked_at_s) == before + 4, "then as seldom as before"
        nursery.cancel_scope.cancel()


async def test_mapping_is_removed_also_while_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    home, taken = Home(monkeypatch), list[TcpAddress | None]()
    async with trio.open_nursery() as nursery:

        def take(address: TcpAddress | None) -> None:
            taken.append(address)
            if address is None:
                nursery.cancel_scope.cancel()

        nursery.start_soon(keep_port_mapping, lambda: home.own, take)
        await trio.sleep(60)
        home.own = [parse_address(f"/ip4/10.7.7.7/tcp/{PORT}")]
        await trio.sleep(60)
    assert home.removed == [[HOST, str(PORT), str(PORT)]]


def test_mapped_address_is_told_once_a_peer_has_reached_us_there() -> None:
    own = OwnAddresses()
    mapped = own.mapped = parse_address(f"/ip4/9.9.9.9/tcp/{PORT}")
    assert mapped not in own.advertised()
    own.confirmed = [mapped]
    assert mapped in own.advertised()
