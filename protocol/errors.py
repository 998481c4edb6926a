"""Whose fault it is: the remote peer's or ours."""


class ProtocolError(Exception):
    """A rule of the protocol was broken; the subclass says by whom."""


class RemoteProtocolError(ProtocolError):
    """The remote peer broke the protocol. Its stream is reset and the peer pays; we go on."""


class UntimelyError(RemoteProtocolError):
    """What came has expired, or was issued in the future, by our clock; an honest peer's may say otherwise."""


class LocalProtocolError(ProtocolError):
    """Our own code tried to say what the state does not allow. A defect of ours, never the remote's."""
