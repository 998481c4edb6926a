"""Violations of the protocol, by the remote peer or by us."""


class ProtocolError(Exception):
    """A violation of the protocol; the subclass tells whose."""


class RemoteProtocolError(ProtocolError):
    """A violation by the remote peer: its stream is reset and the peer is penalised; nothing else is affected."""


class UntimelyError(RemoteProtocolError):
    """A record that has expired, or was issued in the future, by our clock; an honest peer's clock may differ."""


class LocalProtocolError(ProtocolError):
    """An attempt of our own code to send what the state or a bound does not allow: a defect of ours."""
