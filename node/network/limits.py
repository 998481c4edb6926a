"""Limits on the resources that peers may use."""

from dataclasses import dataclass, field

from node.network.admission import MAX_HANDSHAKES, InboundLimits
from node.network.yamux_stream import YamuxLimits


@dataclass(frozen=True, slots=True)
class NetworkLimits:
    """Resources that peers may use, and how long they are waited for."""

    dial_timeout_s: float = 5.0
    request_timeout_s: float = 10.0
    """For a ping, for the negotiation of a stream, and for every operation on the DHT."""
    max_connections: int = 512
    inbound: InboundLimits = field(default=InboundLimits(total=384, per_origin=128, per_range=96))
    """Established inbound ones. The rest is for peers that we dial."""
    handshakes: int = MAX_HANDSHAKES
    """Unfinished inbound handshakes."""
    max_unread_bytes: int = 128 << 20
    """In the buffers of all connections together: 64 streams that are read quickly may have full windows at a time."""
    streams: YamuxLimits = field(default_factory=YamuxLimits)

    @classmethod
    def within(cls, open_files: int) -> "NetworkLimits":
        """Return limits with which connections use at most three eighths of the open-file limit."""
        usual = cls()
        connections = max(8, min(usual.max_connections, open_files // 4))
        inbound = InboundLimits(
            total=connections * 3 // 4,
            per_origin=max(2, connections // 4),
            per_range=max(2, connections * 3 // 16),
            per_relay=max(2, connections // 16),
        )
        return cls(
            max_connections=connections, inbound=inbound, handshakes=max(4, min(usual.handshakes, open_files // 8))
        )
