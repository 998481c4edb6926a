"""The spans that this node serves, their sessions, and the draft models beside them."""

from collections.abc import Iterator

from node.links.inbound_link import InboundLink
from node.stages.draft_model import DraftModel
from node.stages.session import StageSession
from node.stages.span import Span
from protocol.identity import BlockRange, ModelId, SessionId


class SpanTable:
    """What is served here."""

    def __init__(self) -> None:
        self.is_draining = False
        """This node is about to leave: it admits no new sessions."""
        self.spans: dict[tuple[ModelId, BlockRange], Span] = {}
        self.draft_models: dict[ModelId, DraftModel | None] = {}
        """By the model they draft for, whose first blocks are served here; None while one is being loaded."""
        self.withdrawn: set[Span] = set()
        """Spans that are about to go: they are not announced any more."""
        self.closed: set[Span] = set()
        """Of those, the ones that admit no new sessions any more."""

    def sessions(self) -> Iterator[StageSession]:
        """Yield the sessions of all spans."""
        for span in self.spans.values():
            yield from tuple(span.sessions.values())

    def find(self, session: SessionId | None, link: InboundLink) -> tuple[Span, StageSession] | None:
        """Return a session that was opened over this link, and its span."""
        for span in self.spans.values():
            if session is not None and (found := span.sessions.get(session)) and found.opened_by is link:
                return span, found
        return None

    def holding(self, model: ModelId, blocks: BlockRange) -> Span | None:
        """Return the smallest span that has all of these blocks, if it admits new sessions."""
        holding = [
            span
            for key, span in self.spans.items()
            if key[0] == model and span.info.blocks.holds(blocks) and span not in self.closed
        ]
        return min(holding, key=lambda span: len(span.info.blocks), default=None)
