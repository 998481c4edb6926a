"""Ids of sessions on this node: those on the wire are not unique, as any peer that knows a job id can make them."""

from hashlib import sha256

from protocol.identity import JobId, PeerId, SessionId


def local_id(session: SessionId, opened_by: PeerId) -> SessionId:
    """Return an id that no session of another opener has, here, in the engine, or while one is being freed."""
    job = sha256(f"{opened_by}/{session.job}".encode()).hexdigest()[:32]
    return SessionId(JobId(job), session.stage)
