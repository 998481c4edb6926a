from dataclasses import replace

from node.coordinator.job_log import MAX_ENDED, MAX_RUNNING, JobLog, JobState, LoggedJob
from protocol.identity import BlockRange, JobId, ModelId, Stage
from tests.unit.api.fakes import MODEL, PEERS, make_result


def begin(log: JobLog, number: int, *, is_trial: bool = False) -> LoggedJob:
    return log.begin(JobId(f"{number:032x}"), ModelId(MODEL), "tiny", is_trial=is_trial, prompt_tokens=5)


def test_tells_only_what_changed_since_a_revision() -> None:
    log = JobLog()
    first, second = begin(log, 1), begin(log, 2)
    seen = log.revision
    assert log.changed_since(0) == [first, second]
    assert log.changed_since(seen) == []
    stages = (Stage(PEERS[0], BlockRange(0, 8)),)
    log.progress(second, stages=stages, method="baseline", tokens=4, replays=0)
    assert log.changed_since(seen) == [second]
    assert (second.state, second.stages, second.tokens) == (JobState.RUNNING, stages, 4)


def test_remembers_jobs_that_ended_without_their_text() -> None:
    log = JobLog()
    job = begin(log, 1)
    job.result = replace(make_result("a secret", (1, 2)))
    log.end(job, JobState.DONE)
    (ended,) = log.changed_since(0)
    assert ended.result is not None
    assert (ended.result.text, ended.result.token_ids) == ("", ())
    assert ended.result.timing == make_result("", ()).timing


def test_trials_do_not_crowd_out_jobs() -> None:
    log = JobLog()
    log.end(job := begin(log, 0), JobState.DONE)
    for number in range(1, 2 * MAX_ENDED):
        log.end(begin(log, number, is_trial=True), JobState.DONE)
    shown = log.changed_since(0)
    assert job in shown
    assert len(shown) == 1 + MAX_ENDED


def test_lists_a_bounded_number_of_running_jobs() -> None:
    log = JobLog()
    jobs = [begin(log, number) for number in range(2 * MAX_RUNNING)]
    assert log.changed_since(0) == jobs[-MAX_RUNNING:]
