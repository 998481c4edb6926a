"""What the client of a job without a route is told."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from node.coordinator.job import UNSTATED_SHARE, Job
from node.coordinator.prefix_sharing import PrefixClaim
from node.coordinator.refusals import StageRefusal, no_route, shorten
from node.coordinator.submission import JobRequest
from node.models.library import KnownModel
from protocol.identity import BlockRange, JobId, PeerId
from protocol.measurements import TaskKind
from protocol.messages import Load, RefusalReason, Sampling
from selector.routing import NoRouteError

BUSY = Load(sessions=1)


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


def text_job(stated: int | None, **options: Any) -> Job:
    """Return a job for a text of `stated` tokens at most."""
    return Job(
        id=JobId("00" * 16),
        request=JobRequest(model="tiny", prompt="", max_tokens=stated, **options),
        model=cast("KnownModel", None),
        prompt=(1,) * 100,
        sampling=Sampling(max_tokens=stated or 32_000),
        admitted=(),
        claim=PrefixClaim(pages=()),
        began_s=0.0,
    )


def limited(refusals: list[StageRefusal], stated: int = 32_000, share: int = 32_000, **options: Any) -> int:
    """Return the limit of a text that 100 tokens of a prompt are before, once stages have refused it.

    `share`: what it is limited to on its next route where it takes a share.
    """
    job = text_job(stated, **options)
    while shorten(job, refusals):
        job.limit_to_share([Load(free_positions=share * UNSTATED_SHARE)])
    return job.sampling.max_tokens


def refusal(name: str, reason: RefusalReason | None, most_positions: int = 0, load: Load = BUSY) -> StageRefusal:
    return StageRefusal(PeerId(name), reason, "refused", most_positions=most_positions, load=load)


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


def test_limit_is_kept_at_a_peer_that_is_full_of_something_else_than_kv_memory() -> None:
    crowded = refusal("a", RefusalReason.FULL, load=Load())  # of sessions
    assert limited([crowded], 8000) == limited([crowded, refusal("b", RefusalReason.FULL)], 8000) == 8000


def test_share_is_one_of_what_a_full_stage_says_is_free() -> None:
    """What heartbeats said was free is taken by now."""
    full = refusal("a", RefusalReason.FULL, load=Load(free_positions=6000))
    job = text_job(8000)
    assert shorten(job, [full])
    assert job.sampling.max_tokens == 8000, "first what heartbeats said counts"
    assert shorten(job, [full])
    assert job.sampling.max_tokens == 1500
    assert shorten(job, [full])
    assert job.sampling.max_tokens == 512
    assert not shorten(job, [full])


def test_text_that_takes_a_share_is_as_one_without_a_limit() -> None:
    stated, free = text_job(8000), text_job(None)
    assert shorten(stated, [refusal("a", RefusalReason.FULL)])
    stated.output.routed_s = free.output.routed_s = 1.0
    for job in (stated, free):
        assert job.expected_tokens == 512
        job.limit(600)
        assert job.restore_limit()
        assert job.sampling.max_tokens >= 8000
        assert shorten(job, [refusal("a", RefusalReason.FULL), refusal("b", None)])
