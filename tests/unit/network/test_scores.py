"""Peer scores: who lies is heard no longer, who is honest always, and a range of addresses fills no mesh."""

import random
from collections.abc import Iterable

import pytest
from libp2p.peer.id import ID

from node.network.gossip import MAX_MESH_PEERS_PER_RANGE, Router
from node.network.interface import Network
from node.network.scores import MAX_RETAINED, Scores
from protocol.errors import RemoteProtocolError, UntimelyError
from protocol.identity import PeerId

from .conftest import limited, until
from .hosts import TOPIC, our_host

LIAR, HONEST = (ID(bytes([n] * 32)) for n in (1, 2))


def tell(scores: Scores, peer: ID, invalid: int) -> None:
    for _ in range(invalid):
        scores.invalid(peer, TOPIC)


def wait(scores: Scores, seconds: int) -> None:
    for _ in range(seconds):
        scores.on_heartbeat()


def test_invalid_messages_graylist_peer_temporarily_in_all_topics() -> None:
    scores = Scores([TOPIC, "another"])
    tell(scores, LIAR, 1)
    assert scores.allow_publish(LIAR, [TOPIC])
    tell(scores, LIAR, 4)
    assert scores.graylisted(LIAR)
    assert not scores.allow_publish(LIAR, ["another"])
    assert not scores.allow_gossip(LIAR, ["another"])
    assert scores.of(HONEST) == 0
    wait(scores, 30)
    assert not scores.graylisted(LIAR)
    assert not scores.allow_gossip(LIAR, [TOPIC])
    tell(scores, LIAR, 1000)
    wait(scores, 200)
    assert scores.graylisted(LIAR)
    wait(scores, 150)
    assert not scores.graylisted(LIAR)


def test_reconnecting_does_not_reset_bad_score() -> None:
    scores = Scores([TOPIC])
    tell(scores, LIAR, 10)
    scores.remove_peer(LIAR)
    scores.returned(LIAR)
    assert scores.graylisted(LIAR)
    scores.remove_peer(LIAR)
    wait(scores, 600)
    assert LIAR not in scores.invalid_messages


def test_deliveries_do_not_offset_invalid_messages() -> None:
    scores = Scores([TOPIC])
    for _ in range(1000):
        scores.on_first_delivery(LIAR, TOPIC)
    tell(scores, LIAR, 5)
    assert not scores.allow_publish(LIAR, [TOPIC])


def test_retained_bad_scores_are_bounded() -> None:
    scores = Scores([TOPIC])
    for number in range(MAX_RETAINED + 10):
        peer = ID(number.to_bytes(32, "big"))
        tell(scores, peer, 10)
        scores.remove_peer(peer)
    assert len(scores.invalid_messages) == MAX_RETAINED


async def test_gossip_graylists_sender_of_invalid_messages_only() -> None:
    def validate(source: PeerId, data: bytes) -> bool:
        if data.startswith(b"forged"):
            raise RemoteProtocolError("a forged message")
        if data.startswith(b"late"):
            raise UntimelyError("an expired message")
        return not data.startswith(b"too much")

    listener, honest, liar = our_host(1), our_host(2), our_host(3)
    for peer in (listener, honest):
        peer.join_topic(TOPIC, validate)
    with limited(30):
        async with listener.running(), honest.running(), liar.running(), listener.subscribe(TOPIC) as heard:
            for peer in (honest, liar):
                await peer.connect(listener.multiaddrs[0])
                await until(lambda peer=peer: _subscribed(peer, listener))  # type: ignore[misc]
            scores = listener._gossip.scores
            for number in range(20):
                await liar.publish(TOPIC, b"forged %d" % number)
                await honest.publish(TOPIC, b"late %d" % number)
                await honest.publish(TOPIC, b"too much %d" % number)
            await until(lambda: scores.graylisted(_id(liar)))
            router = _router(listener)
            await until(lambda: _id(liar) not in router.mesh[TOPIC])
            await liar.publish(TOPIC, b"believe me now")
            await honest.publish(TOPIC, b"the truth")
            assert (await anext(heard)).data == b"the truth"
            assert scores.of(_id(honest)) >= 0


def _id(network: Network) -> ID:
    return ID.from_base58(network.peer_id)


def _subscribed(speaker: Network, listener: Network) -> bool:
    pubsub = speaker._gossip._pubsub  # type: ignore[attr-defined]
    return _id(listener) in pubsub.peer_topics.get(TOPIC, set())


def _router(network: Network) -> Router:
    router = network._gossip._pubsub.router  # type: ignore[attr-defined]
    assert isinstance(router, Router)
    return router


@pytest.mark.parametrize(("shared", "expected"), [("8.8.8.0/24", MAX_MESH_PEERS_PER_RANGE), (None, 6)])
def test_gossip_mesh_limits_peers_per_address_range(
    shared: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = [ID(bytes([n] * 32)) for n in range(30)]
    router = Router(Scores([TOPIC]))

    def everybody(self: object, topic: str, count: int, minus: Iterable[ID], check: bool) -> list[ID]:
        return random.sample([peer for peer in peers if peer not in minus], k=len(peers) - len(set(minus)))

    monkeypatch.setattr("libp2p.pubsub.gossipsub.GossipSub._get_in_topic_gossipsub_peers_from_minus", everybody)
    monkeypatch.setattr(router, "_range_of", lambda peer: shared)
    assert len(router._get_in_topic_gossipsub_peers_from_minus(TOPIC, 6, (), True)) == expected
