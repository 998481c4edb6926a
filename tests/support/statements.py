"""Statements of a consensus chain."""

from protocol.consensus_values import Statement
from protocol.forms import Digest
from protocol.identity import PeerId


def founding_statement(genesis: Digest, founder: PeerId, epoch: int) -> Statement:
    """Return the statement by which a peer founds a chain, so that it is the only member."""
    digest = bytes(32)
    return Statement(
        chain=genesis,
        epoch=epoch,
        parent=genesis,
        proposer=founder,
        commits=(),
        joined=(founder,),
        left=(),
        expelled=(),
        beacon=digest,
        set_digest=digest,
        table_digest=digest,
        state_digest=digest,
    )
