"""Peers behind every pair of NATs reach each other: directly, through a hole, or through a relay."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import pytest

from .lab import HOMES, PUBLIC, Lab, Nat, missing

REASON = missing()
pytestmark = [
    pytest.mark.nat,
    pytest.mark.skipif(REASON is not None and not os.environ.get("METASWARM_REQUIRE_ALL"), reason=REASON or ""),
]

SOON_S = 5.0
"""Over a connection that is there already, also on a busy machine."""


class Peer:
    """A peer in a namespace."""

    def __init__(self, lab: Lab, space: str, seed: int, *announce: str) -> None:
        command = lab.inside(space, sys.executable, "-m", "tests.nat.peer", str(seed), *announce)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.space = space
        self._id: str | None = None

    @property
    def id(self) -> str:
        """The peer's id, once it runs."""
        if self._id is None:
            self._id = self._read()
        assert self._id is not None
        return self._id

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the peer in {self.space} has died"
        return json.loads(line)

    def ask(self, *words: object) -> Any:
        """Return the answer to a command. Raises AssertionError for an error."""
        answer = self.try_ask(*words)
        assert "error" not in answer, answer["error"]
        return answer["ok"]

    def try_ask(self, *words: object) -> dict[str, Any]:
        assert self.id
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        answer: dict[str, Any] = self._read()
        return answer

    def end(self) -> None:
        """Kill the peer, which has not said farewell to anybody."""
        self.process.kill()
        self.process.communicate()

    def address(self, host: str) -> str:
        return f"/ip4/{host}/tcp/4001/p2p/{self.id}"


def wait(condition: Callable[[], bool], peer: Peer | None = None, timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, peer and (peer.space, peer.ask("reach"))
        time.sleep(0.1)


@contextmanager
def swarm(*kinds: Nat, delay_ms: float = 5, relays: int = 1) -> Iterator[tuple[Peer, ...]]:
    """Run public relays, and a peer in each of some homes, which knows the relays only."""
    with ExitStack() as stack:
        homes = dict(zip(HOMES, kinds, strict=False))
        lab = stack.enter_context(Lab().built(delay_ms=delay_ms, **homes))
        public = list(PUBLIC)[:relays]
        peers = tuple(Peer(lab, space, seed) for seed, space in enumerate([*public, *homes], 1))
        for peer in peers:
            stack.callback(peer.end)
        for peer in peers[relays:]:
            for relay in peers[:relays]:
                peer.ask("connect", relay.address(PUBLIC[relay.space]))
        yield peers


def settled(peer: Peer, kind: Nat, relays: int = 1) -> bool:
    """Return whether a peer knows whether it can be dialled, and has its relays if not."""
    reach = peer.ask("reach")
    if kind in {Nat.OPEN, Nat.FULL_CONE}:
        return bool(reach["verdict"] == "public")
    return bool(reach["verdict"] == "private" and len(reach["relays"]) >= relays)


def expected(kinds: tuple[Nat, Nat]) -> set[str]:
    """Return the ways that are good enough for a pair."""
    if {Nat.OPEN, Nat.FULL_CONE} & set(kinds):
        return {"direct", "punched"}
    return {"relayed"} if Nat.SYMMETRIC in kinds else {"punched"}


def goes_as_expected(one: Peer, two: Peer, kinds: tuple[Nat, Nat]) -> bool:
    """Return whether two peers reach each other in a way that is good enough, as both see it."""
    return one.ask("way", two.id) == two.ask("way", one.id) and one.ask("way", two.id) in expected(kinds)


def test_homes_behind_every_pair_of_nats_reach_each_other() -> None:
    # Two public peers: nobody alone can tell a home at which address it is seen, and reached.
    with swarm(*Nat, *Nat, delay_ms=15, relays=2) as (_, _, *homes):
        for peer, kind in zip(homes, [*Nat, *Nat], strict=True):
            wait(lambda peer=peer, kind=kind: settled(peer, kind), peer)  # type: ignore[misc]
        ones, others = homes[: len(Nat)], homes[len(Nat) :]
        for (one, kind), (two, other_kind) in product(zip(ones, Nat, strict=True), zip(others, Nat, strict=True)):
            one.ask("learn", two.id, *two.ask("addresses"))
            took_s = one.ask("echo", two.id, 1000)
            # On a busy machine the first stream goes through the relay, and the hole is there a moment later.
            wait(lambda a=one, b=two, kinds=(kind, other_kind): goes_as_expected(a, b, kinds), one)  # type: ignore[misc]
            print(f"{kind} to {other_kind}: {one.ask('way', two.id)}, first byte after {took_s:.2f} s")
            assert two.ask("echo", one.id, 1000) < SOON_S


def test_peer_behind_a_second_relay_is_reached_when_the_first_dies() -> None:
    with swarm(Nat.SYMMETRIC, Nat.SYMMETRIC, relays=2) as (first, second, one, two):
        wait(lambda: settled(one, Nat.SYMMETRIC, 2) and settled(two, Nat.SYMMETRIC, 2))
        one.ask("learn", two.id, *two.ask("addresses"))
        one.ask("echo", two.id, 1000)
        assert one.ask("way", two.id) == "relayed"
        relay = next(each for each in (first, second) if each.id == one.ask("relay", two.id))
        relay.end()
        assert one.ask("echo", two.id, 1000) < SOON_S
        assert one.ask("relay", two.id) not in {None, relay.id}


def test_nobody_notices_the_death_of_a_relay_after_a_hole_was_punched() -> None:
    with swarm(Nat.RESTRICTED, Nat.RESTRICTED) as (relay, one, two):
        wait(lambda: settled(one, Nat.RESTRICTED) and settled(two, Nat.RESTRICTED))
        one.ask("learn", two.id, *two.ask("addresses"))
        one.ask("echo", two.id, 1000)
        wait(lambda: one.ask("way", two.id) == two.ask("way", one.id) == "punched", one)
        relay.end()
        assert one.ask("echo", two.id, 100_000) < SOON_S
        assert two.ask("echo", one.id, 100_000) < SOON_S


def test_forwarded_port_is_dialled_directly() -> None:
    with Lab().built(a=Nat.RESTRICTED, b=Nat.RESTRICTED) as lab, ExitStack() as stack:
        lab.forward("a", 4001)
        relay, one, two = (Peer(lab, "pub", 1), Peer(lab, "a", 2, "/ip4/70.0.0.1/tcp/4001"), Peer(lab, "b", 3))
        for peer in (relay, one, two):
            stack.callback(peer.end)
        for peer in (one, two):
            peer.ask("connect", relay.address(PUBLIC["pub"]))
        wait(lambda: one.ask("reach")["verdict"] == "public")
        two.ask("learn", one.id, *one.ask("addresses"))
        two.ask("echo", one.id, 1000)
        assert two.ask("way", one.id) == "direct"
        assert one.ask("reach")["relays"] == []
        assert not [address for address in one.ask("addresses") if "/127.0.0.1/" in address]
