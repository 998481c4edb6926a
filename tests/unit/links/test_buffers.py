"""Memory limits of job links."""

from node.links.buffers import OUTBOX_BYTES, OUTBOXES_BYTES, PARTIAL_BYTES, LinkBuffers, SendQueue


def test_partial_frames_of_stalest_links_are_dropped_first() -> None:
    """However many peers have begun a frame, and each with less than the honest one."""
    buffers = LinkBuffers()
    ended: list[str] = []

    class Link:
        def __init__(self, name: str) -> None:
            self.peer = name

        def end(self, why: str) -> None:
            ended.append(self.peer)

    honest, *others = (Link(f"peer {number}") for number in range(40))
    for step, other in enumerate(others, 1):
        buffers.update_partial(honest, (1 << 20) * step // len(others))
        buffers.update_partial(other, 900 << 10)
    assert honest.peer not in ended
    assert ended == [other.peer for other in others[: len(ended)]]
    assert buffers.partial_bytes <= PARTIAL_BYTES


def test_send_queue_is_bounded_alone_and_with_all_others() -> None:
    buffers = LinkBuffers()
    queues = [SendQueue(buffers) for _ in range(OUTBOXES_BYTES // OUTBOX_BYTES + 2)]
    for queue in queues[:-1]:
        assert queue.has_room(OUTBOX_BYTES)
        queue.put([bytes(OUTBOX_BYTES)])
        assert not queue.is_full
        assert queue.has_room(1) is (buffers.outgoing_bytes < OUTBOXES_BYTES)
    assert queues[-1].has_room(OUTBOX_BYTES), "an empty queue always takes a step"
    queues[0].put([b"1"])
    assert queues[0].is_full
    for queue in queues:
        queue.clear()
    assert buffers.outgoing_bytes == 0


def test_send_queue_joins_small_pieces_and_keeps_their_order() -> None:
    queue = SendQueue(LinkBuffers())
    queue.put([b"a", b"b"])
    queue.put([bytes(1 << 20), b"c"])
    taken = []
    while (data := queue.take()) is not None:
        taken.append(data)
        queue.on_sent(len(data))
    assert [len(data) for data in taken] == [2, 1 << 20, 1]
    assert b"".join(taken) == b"ab" + bytes(1 << 20) + b"c"
    assert queue.accepted_bytes == (1 << 20) + 3


def test_control_messages_overtake_the_rows_of_a_step_and_no_step() -> None:
    queue, sent = SendQueue(LinkBuffers()), bytearray()
    queue.put([b"[1", b"1", b"1]"])
    queue.put([b"[2", b"2", b"2]"])
    queue.put_control([b" ping "], overtakes=False)
    queue.put_control([b" close "], overtakes=True)
    queue.put_control([b" open "], overtakes=True)
    while (data := queue.take()) is not None:
        sent += data
        queue.on_sent(len(data))
    assert sent == b"[111][2 close  open 22] ping "
    assert queue.accepted_bytes == len(sent)
    queue.put_control([b"close"], overtakes=True)
    assert queue.take() == b"close", "there is nothing to overtake"
