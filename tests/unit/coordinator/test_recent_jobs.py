from dataclasses import replace

from node.coordinator.recent_jobs import MAX_ENDED, MAX_RUNNING, JobState, RecentJob, RecentJobs
from protocol.identity import BlockRange, JobId, ModelId, Stage
from tests.unit.api.fakes import MODEL, PEERS, make_result


def begin(recent: RecentJobs, number: int, *, is_trial: bool = False) -> RecentJob:
    return recent.begin(JobId(f"{number:032x}"), ModelId(MODEL), "tiny", is_trial=is_trial, prompt_tokens=5)


def test_tells_only_what_changed_since_a_revision() -> None:
    recent = RecentJobs()
    first, second = begin(recent, 1), begin(recent, 2)
    seen = recent.revision
    assert recent.changed_since(0) == [first, second]
    assert recent.changed_since(seen) == []
    stages = (Stage(PEERS[0], BlockRange(0, 8)),)
    recent.progress(second, stages=stages, method="baseline", tokens=4, replays=0)
    assert recent.changed_since(seen) == [second]
    assert (second.state, second.stages, second.tokens) == (JobState.RUNNING, stages, 4)


def test_remembers_jobs_that_ended_without_their_text() -> None:
    recent = RecentJobs()
    job = begin(recent, 1)
    job.result = replace(make_result("a secret", (1, 2)))
    recent.end(job, JobState.DONE)
    (ended,) = recent.changed_since(0)
    assert ended.result is not None
    assert (ended.result.text, ended.result.token_ids) == ("", ())
    assert ended.result.timing == make_result("", ()).timing


def test_trials_do_not_crowd_out_jobs() -> None:
    recent = RecentJobs()
    recent.end(job := begin(recent, 0), JobState.DONE)
    for number in range(1, 2 * MAX_ENDED):
        recent.end(begin(recent, number, is_trial=True), JobState.DONE)
    shown = recent.changed_since(0)
    assert job in shown
    assert len(shown) == 1 + MAX_ENDED


def test_lists_a_bounded_number_of_running_jobs() -> None:
    recent = RecentJobs()
    jobs = [begin(recent, number) for number in range(2 * MAX_RUNNING)]
    assert recent.changed_since(0) == jobs[-MAX_RUNNING:]
