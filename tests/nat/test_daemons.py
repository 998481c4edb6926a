"""Real daemons behind NATs serve each other's jobs."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from node.models.importer import import_model
from node.models.store import ModelStore

from .daemon import MODEL, LabDaemon, until
from .lab import PUBLIC, Lab, Nat, missing

REASON = missing()
pytestmark = [
    pytest.mark.nat,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None and not os.environ.get("METASWARM_REQUIRE_ALL"), reason=REASON or ""),
]

FIRST, SECOND = f"{MODEL}:0-15", f"{MODEL}:15-30"
REFUSED_S = 10.0
HOMES = dict(zip("bcdef", Nat, strict=True))
"""The second home of each pair."""


@pytest.fixture(scope="module", autouse=True)
def package() -> None:
    """The demo model, in the user's cache."""
    store = ModelStore()
    found = store.find(store.resolve(MODEL))
    if found is None or found.missing():
        import_model(MODEL, store)


def describe(daemon: LabDaemon, answer: dict[str, Any]) -> str:
    """Return one cell of the table; check that the job was served by both homes, or refused in time."""
    if "error" in answer:
        assert answer["took_s"] < REFUSED_S, answer
        assert "reach" in answer["error"]["message"], answer
        return f"refused in {answer['took_s']:.1f} s"
    told = answer["metaswarm"]
    assert len(told["route"]) == 2, told
    return f"{told['timing']['ttft_s']:.2f} s"


def loopback(daemon: LabDaemon) -> list[str]:
    """Return the loopback addresses that a daemon knows of others, or tells."""
    told = [*daemon.ask("/swarm/status")["multiaddrs"]]
    told += [address for peer in daemon.ask("/swarm/peers")["peers"] for address in peer["addresses"]]
    return [address for address in told if "/127." in address or "/ip6/::1/" in address]


@pytest.mark.soak
@pytest.mark.parametrize("kind", list(Nat))
def test_job_from_each_peer_of_every_pair_is_served(kind: Nat, tmp_path: Path) -> None:
    """Prints a line of the table for each pair: way, then the time to the first token from either home and outside."""
    with Lab().built(delay_ms=15, a=kind, **HOMES) as lab, ExitStack() as stack:
        public = LabDaemon(lab, "pub", tmp_path / "pub")
        stack.callback(public.end)
        join = ("--bootstrap", public.address(PUBLIC["pub"]))
        one = LabDaemon(lab, "a", tmp_path / "a", *join, "--serve", FIRST)
        stack.callback(one.end)
        for home, other_kind in HOMES.items():
            two = LabDaemon(lab, home, tmp_path / home, *join, "--serve", SECOND)
            try:
                peers = (one, two, public)
                for peer in peers:
                    assert peer.ready
                    until(peer.is_complete, f"complete at {peer.space}")
                cells = [describe(peer, peer.complete()) for peer in peers]
                way = one.way(two.id)
                print(f"| {kind} | {other_kind} | {way} | {' | '.join(cells)} |", flush=True)
                assert way in {"relayed", "punched", "direct"}
                assert [loopback(peer) for peer in peers] == [[], [], []]
            finally:
                two.end()
