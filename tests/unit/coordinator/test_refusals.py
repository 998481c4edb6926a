"""What the client of a job without a route is told."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from node.coordinator.job import Job
from node.coordinator.refusals import StageRefusal, no_route, shorten
from protocol.identity import BlockRange, PeerId
from protocol.measurements import TaskKind
from protocol.messages import RefusalReason
from selector.routing import NoRouteError


def job_with(*methods: str) -> Job:
    """Return a job that may be served with these methods."""
    job = SimpleNamespace(
        model=SimpleNamespace(name="tiny"),
        admitted=[SimpleNamespace(name=name) for name in methods],
        kind=TaskKind.GENERATE,
        request=SimpleNamespace(budget=None),
    )
    return cast("Job", job)


@pytest.mark.parametrize(
    ("unreached", "told"),
    [
        ((), "no peer serves blocks 3-6 of tiny: start a node with --serve"),
        (("far",), "no peer that this node can reach serves blocks 3-6 of tiny (announced by far)"),
    ],
)
def test_blocks_of_peers_that_cannot_be_reached_are_told_from_those_that_nobody_serves(
    unreached: tuple[str, ...], told: str
) -> None:
    error = NoRouteError([BlockRange(3, 6)])
    error.unreached = unreached
    assert str(no_route(job_with(), error, {}, {})).startswith(told)


def test_error_names_few_of_many_methods() -> None:
    names = [f"method-{number}" for number in range(12)]
    error = no_route(job_with(*names), NoRouteError(()), {}, {})
    assert "method-0 or method-1 or method-2 or one of 9 others runs them as a whole only" in error.message
    assert "method-2 runs" in no_route(job_with(*names[:3]), NoRouteError(()), {}, {}).message


def limited(refusals: list[StageRefusal], stated: int = 32_000, share: int = 32_000, **options: object) -> int:
    """Return the limit of a text that 100 tokens of a prompt are before, once stages have refused it.

    `share`: what it is limited to on its next route where it takes a share.
    """
    sampling = SimpleNamespace(max_tokens=stated)
    request = {"max_tokens": stated, "background": False, "ignore_eos": False, "min_tokens": 0}
    job = SimpleNamespace(
        request=SimpleNamespace(**request | options),
        on_served=None,
        takes_share=False,
        sampling=sampling,
        prompt=[1] * 100,
        output=SimpleNamespace(tokens=[], routed_s=None),
        tokens_left=1,
        limit=lambda tokens: setattr(sampling, "max_tokens", tokens),
    )
    while shorten(cast("Job", job), refusals):
        if job.takes_share:
            sampling.max_tokens = min(sampling.max_tokens, share)
    return int(sampling.max_tokens)


def refusal(name: str, reason: RefusalReason | None, most_positions: int = 0) -> StageRefusal:
    return StageRefusal(PeerId(name), reason, "refused", most_positions=most_positions)


def test_limit_is_cut_until_the_smallest_of_several_stages_holds_it() -> None:
    assert limited([refusal("a", RefusalReason.FULL, 2048), refusal("b", RefusalReason.FULL, 1792)]) == 1692


def test_limit_of_the_user_is_cut_only_where_no_peer_has_room_for_it() -> None:
    small, busy = refusal("a", RefusalReason.FULL, 2048), refusal("b", RefusalReason.FULL)
    assert limited([small, refusal("b", None)]) == 32_000, "its link is broken"
    assert limited([busy, refusal("b", None)]) == 32_000
    assert limited([small, refusal("b", RefusalReason.UNABLE)]) == 1948
    assert limited([busy]) == limited([small, busy]) == 512, "it is busy, also for what the small one holds"
    assert limited([busy], 400) == 400, "as much has a text without a limit, too"


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 600}])
def test_text_of_a_certain_length_waits_for_a_peer_that_is_busy(options: dict[str, Any]) -> None:
    small, busy = refusal("a", RefusalReason.FULL, 2048), refusal("b", RefusalReason.FULL)
    assert limited([small, busy], **options) == 32_000
    assert limited([small], **options) == 1948


@pytest.mark.parametrize(("asked", "held"), [(8093, 8092), (16_183, 8092)])
def test_limit_slightly_beyond_what_stages_hold_is_cut_to_that(asked: int, held: int) -> None:
    assert limited([refusal("a", RefusalReason.FULL, 8192)], asked, share=2048) == held


def test_limit_far_beyond_what_stages_hold_leaves_others_their_share() -> None:
    assert limited([refusal("a", RefusalReason.FULL, 8192)], 16_184, share=2048) == 2048
