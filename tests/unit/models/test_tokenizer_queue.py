"""Whose turn it is at a model's tokenizer process."""

from node.models.tokenizer_queue import CallQueue


def askers(queue: CallQueue) -> list[str]:
    """Return who is served, in order."""
    return [call.asker for call in iter(queue.take, None)]


def test_long_request_of_before_costs_its_asker_nothing_once_the_queue_was_empty() -> None:
    queue = CallQueue()
    queue.add(1, "a", 8_000_000, "", {})
    assert askers(queue) == ["a"]
    for _ in range(20):
        queue.add(1, "b", 300_000, "", {})
    queue.add(1, "a", 10, "", {})
    assert askers(queue)[:2] == ["b", "a"]


def test_asker_of_a_long_request_waits_for_others_while_any_wait() -> None:
    queue = CallQueue()
    for asker, cost in (("a", 900_000), ("a", 10), ("b", 300_000), ("b", 300_000), ("b", 300_000)):
        queue.add(1, asker, cost, "", {})
    assert askers(queue) == ["a", "b", "b", "b", "a"]


def test_texts_under_way_come_first() -> None:
    queue = CallQueue()
    for priority, asker in ((1, "prompt"), (0, "text")):
        queue.add(priority, asker, 10, "", {})
    assert askers(queue) == ["text", "prompt"]
