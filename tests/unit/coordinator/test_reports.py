"""What is reported of jobs and of their sessions on stages: once each, however they end, and without their text."""

from dataclasses import dataclass, field, replace

import pytest
import trio
from trio.testing import MockClock

from node.coordinator.job_report import JobReport
from node.coordinator.submission import JobError, JobErrorCode, JobRequest, RequestOrigin, TextDelta
from node.models.errors import ModelError
from node.models.library import KnownModel
from node.stages.session_report import SessionReport
from node.telemetry.observer import Telemetry
from protocol.identity import BlockRange, ModelId
from protocol.messages import FailureReason
from tests.support.job_peers import Peer, Swarm, open_swarm

REQUEST = JobRequest(model="fake", prompt="3 1 4", max_tokens=6, origin=RequestOrigin(request_id="req_1"))


@dataclass
class Reports:
    """Collects reports. Implements `JobObserver` and `StageObserver`."""

    jobs: list[JobReport] = field(default_factory=list)
    sessions: list[SessionReport] = field(default_factory=list)
    slices: int = 0
    steps_s: list[float] = field(default_factory=list)

    def start_trace(self, trace_parent: str) -> str:
        return trace_parent

    def on_job_ended(self, report: JobReport) -> None:
        self.jobs.append(report)

    def on_step(self, model: ModelId, compute_s: float) -> None:
        self.steps_s.append(compute_s)

    def on_slice(self, model: ModelId, phase: str, queue_s: float, step_s: float) -> None:
        assert queue_s >= 0 < step_s
        self.slices += 1

    def on_session_ended(self, report: SessionReport) -> None:
        self.sessions.append(report)


@dataclass
class Broken:
    """An observer's method that takes a report, and then fails."""

    jobs: list[JobReport] = field(default_factory=list)

    def __call__(self, report: JobReport) -> None:
        self.jobs.append(report)
        raise RuntimeError("another defect")


async def watched_swarm(swarm: Swarm) -> tuple[Peer, Reports]:
    """Return the coordinator of a swarm of two stages, and what is reported of it all."""
    reports = Reports()
    for span in ((0, 5), (5, 9)):
        peer = await swarm.join(span)
        for served in peer.stages.spans():
            served._observer = reports
    coordinator = await swarm.join()
    coordinator.coordinator.observer = reports
    await swarm.settle()
    return coordinator, reports


async def test_reports_a_done_job_and_its_sessions(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer, reports = await watched_swarm(swarm)
        result = await peer.run(replace(REQUEST, origin=RequestOrigin(request_id="req_1", trace_parent="t")))
        (report,) = reports.jobs
        assert (report.outcome, report.job_id, report.result) == ("done", result.job_id, result)
        assert (report.prompt_tokens, report.completion_tokens, report.method) == (3, 6, result.method.name)
        times = (report.began_s, report.prepared_s, report.routed_s, report.first_token_s, report.last_token_s)
        assert list(times) == sorted(times)
        assert report.last_token_s <= report.ended_s
        first, last = sorted(reports.sessions, key=lambda each: each.blocks.start)
        for session in (first, last):
            assert (session.request_id, session.trace_parent) == ("req_1", "t")
            assert session.coordinator == peer.id
            assert session.phases.prefill.rows + session.phases.decode.rows >= 3 + 5
            assert session.phases.decode.compute_s > 0
        assert len(reports.steps_s) == reports.slices, "one job alone: a slice a step"
        assert min(reports.steps_s) > 0
        assert reports.slices == sum(each.phases.prefill.steps + each.phases.decode.steps for each in reports.sessions)


async def test_bytes_of_a_continued_session_are_reported_once(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer, reports = await watched_swarm(swarm)
        await peer.run(replace(REQUEST, max_tokens=40))
        (whole,) = (report for report in reports.sessions if report.blocks.start == 0)
        reports.sessions.clear()
        count = 0
        async with peer.coordinator.submit(replace(REQUEST, max_tokens=40)) as events:
            async for event in events:
                count += isinstance(event, TextDelta)
                if count == 20 and isinstance(event, TextDelta):
                    swarm.hub.kill(swarm.peers[1].id)
                    await swarm.join((5, 9))
        former, successor = (report for report in reports.sessions if report.blocks.start == 0)
        assert former.bytes_in + former.bytes_out > 0
        # All tokens, and all outputs for the new stage, come once more.
        assert successor.bytes_in == whole.bytes_in
        assert successor.bytes_out == whole.bytes_out


async def test_reports_each_end_once(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer, reports = await watched_swarm(swarm)
        async with peer.coordinator.submit(REQUEST) as events:
            async for _ in events:
                break
        with pytest.raises(JobError):
            await peer.run(replace(REQUEST, method="nonsense"))
        for served in swarm.peers[:2]:
            served.stages.start_draining()
        with pytest.raises(JobError):
            await peer.run(REQUEST)
        found = [(report.outcome, report.error) for report in reports.jobs]
        assert found == [("cancelled", None), ("rejected", JobErrorCode.INVALID), ("failed", JobErrorCode.UNCOVERED)]


async def test_defect_is_reported_as_a_failure_and_leaves_nothing_behind(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        peer, reports = await watched_swarm(swarm)

        async def fails(*_: object) -> None:
            await trio.lowlevel.checkpoint()
            raise RuntimeError("a defect")

        monkeypatch.setattr(peer.coordinator, "_finish", fails)
        monkeypatch.setattr(reports, "on_job_ended", broken := Broken())
        with pytest.raises(RuntimeError):
            await peer.run(REQUEST)
        (report,) = broken.jobs
        assert (report.outcome, report.error) == ("failed", JobErrorCode.FAILED)
        assert report.reason == "unexpected RuntimeError", "the message of an unforeseen error may quote anything"
        await peer.coordinator.wait_idle()


async def test_model_that_is_not_known_is_not_in_the_log(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def unknown(text: str) -> KnownModel:
        await trio.lowlevel.checkpoint()
        raise ModelError("there is no such model")

    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        monkeypatch.setattr(peer.coordinator, "_open_model", unknown)
        peer.coordinator.observer = Telemetry(lambda model: "fake")
        with pytest.raises(JobError):
            await peer.run(replace(REQUEST, model="\x1b[31mnonsense"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "job ended" in line)
    assert "nonsense" not in line


async def test_job_that_finds_no_route_while_its_node_drains_is_sent_to_another(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        peer.coordinator.observer = reports = Reports()
        await swarm.settle()

        def begin_draining(trace_parent: str) -> str:
            peer.coordinator.draining = True
            peer.stages.start_draining()
            return trace_parent

        monkeypatch.setattr(reports, "start_trace", begin_draining)  # the first that a job does
        with pytest.raises(JobError) as caught:
            await peer.run(REQUEST)
        assert caught.value.code is JobErrorCode.LEAVING
        assert "another peer" in caught.value.message
        (report,) = reports.jobs
        assert (report.outcome, report.error) == ("failed", JobErrorCode.LEAVING)
        assert "of fake" in report.reason, "the log has what was missing"


async def test_log_says_why_a_job_failed(virtual_clock: MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 5))
        peer.coordinator.observer = Telemetry(lambda model: "fake")
        await swarm.settle()
        with pytest.raises(JobError):
            await peer.run(REQUEST)
        with pytest.raises(JobError, match="secret"):
            await peer.run(replace(REQUEST, method="secret"))
    failed, rejected = (line for line in capsys.readouterr().out.splitlines() if "job ended" in line)
    assert "no peer serves blocks 5-9 of fake" in failed
    assert "invalid_request" in rejected
    assert "secret" not in rejected, "a message about a client's mistake may quote it"


async def test_sessions_of_measurements_are_logged_for_debugging(
    virtual_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        peer.stages.spans()[0]._observer = Telemetry(lambda model: "fake")
        await swarm.settle()
        await peer.run(replace(REQUEST, background=True))
        await peer.run(REQUEST)
    levels = [
        level
        for line in capsys.readouterr().out.splitlines()
        for level in ("debug", "info")
        if "session ended" in line and f"[{level}" in line
    ]
    assert levels == ["debug", "info"]


async def test_reports_how_a_session_ended(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer, reports = await watched_swarm(swarm)
        await peer.run(REQUEST)
        async with peer.coordinator.submit(REQUEST) as events:
            while not isinstance(await anext(events), TextDelta):
                pass
            (span,) = swarm.peers[1].stages.spans()
            (lost,) = span.sessions.values()
            span.fail(lost, FailureReason.ENGINE, "its worker died")
            assert [event async for event in events]
        with trio.move_on_after(60):
            async with peer.coordinator.submit(REQUEST) as events:
                while not isinstance(await anext(events), TextDelta):
                    pass
                swarm.hub.kill(peer.id)
                await trio.sleep_forever()
        for blocks, broken in ((BlockRange(0, 5), ("continued", None)), (BlockRange(5, 9), ("failed", "engine"))):
            found = [(report.outcome, report.error) for report in reports.sessions if report.blocks == blocks]
            assert found == [("closed", None), broken, ("closed", None), ("disconnected", None)]


async def test_lines_of_the_log_have_no_text(virtual_clock: MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join((0, 9))
        telemetry = Telemetry(lambda model: "fake")
        peer.coordinator.observer = telemetry
        peer.stages.spans()[0]._observer = telemetry
        await swarm.settle()
        capsys.readouterr()
        result = await peer.run(replace(REQUEST, prompt="271828 182845"))
        await trio.sleep(1)
    lines = capsys.readouterr().out.splitlines()
    assert sum("job ended" in line for line in lines) == 1
    assert sum("session ended" in line for line in lines) == 1
    assert all("req_1" in line for line in lines if "ended" in line)
    for text in ("271828", "182845", result.text.strip()):
        assert text not in "\n".join(lines)
