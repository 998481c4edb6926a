"""Who holds a route up, by what its stages show."""

import pytest

from node.coordinator.straggler_detector import (
    MOST_LIMIT_S,
    PACE_LIMIT,
    REPORTING_LIMIT,
    SILENT_LIMIT,
    Progress,
    StragglerDetector,
)

STEP_S = 0.05
SILENT_S, REPORTING_S = SILENT_LIMIT[0], REPORTING_LIMIT[0]


def a_watch(stages: int = 3, rows: int = 20, step_s: float = STEP_S) -> StragglerDetector:
    return StragglerDetector([0] * stages, rows, lambda _, rows: step_s * rows, 0.0)


def at(position: int, received: int | None = None) -> Progress:
    return Progress(received=position if received is None else received, computed=position, sent=position)


def suspects(watch: StragglerDetector, now_s: float) -> tuple[int, ...]:
    lag = watch.find(now_s)
    return () if lag is None else lag.suspects


def decoding(stages: int = 3, position: int = 20, step_s: float = STEP_S) -> StragglerDetector:
    """A route whose last token came at 0."""
    watch = a_watch(stages, position, step_s)
    watch.token(position, 0.0)
    watch.wait(0.0)
    return watch


def test_blames_the_first_stage_that_has_its_input_and_has_not_computed_it() -> None:
    for hanging in range(3):
        watch = decoding()
        for stage in range(3):
            watch.report(stage, at(21) if stage < hanging else at(20, 21 if stage == hanging else 20), 1.0)
        assert suspects(watch, REPORTING_S - 0.1) == ()
        assert suspects(watch, REPORTING_S + 0.1) == (hanging,)


def test_unreporting_stage_is_judged_by_its_neighbours() -> None:
    watch = decoding()
    watch.report(0, at(21), 1.0)
    watch.report(2, at(20), 1.0)
    assert suspects(watch, SILENT_S - 0.1) == ()
    assert suspects(watch, SILENT_S + 0.1) == (1,)
    watch.report(2, at(20, 21), 1.0)
    assert suspects(watch, SILENT_S + 0.1) == (), "its successor has the row: it has computed it"
    assert suspects(watch, REPORTING_S + 1.1) == (2,)


def test_unreporting_stages_are_all_suspects() -> None:
    assert suspects(decoding(), SILENT_S + 0.1) == (0, 1, 2)
    watch = decoding()
    watch.report(0, at(21), 1.0)
    assert suspects(watch, SILENT_S + 0.1) == (1, 2)


def test_blames_last_stage_for_a_sampled_token_that_never_came() -> None:
    watch = decoding()
    for stage in range(3):
        watch.report(stage, at(21), 1.0)
    assert suspects(watch, SILENT_S + 0.1) == (2,)


def test_names_the_earlier_stage_of_a_dispute() -> None:
    watch = decoding()
    watch.report(0, at(21), 1.0)
    watch.report(1, at(20), 1.0)
    lag = watch.find(SILENT_S + 0.1)
    assert lag is not None
    assert (lag.suspects, lag.earlier) == ((1,), 0)
    watch = decoding()
    watch.report(0, at(20), 1.0)
    lag = watch.find(SILENT_S + 0.1)
    assert lag is not None
    assert (lag.suspects, lag.earlier) == ((0,), 2), "the token came here, so the last stage has it"


def test_blames_first_stage_that_denies_the_prompt() -> None:
    watch = a_watch(step_s=0.0)
    watch.wait(0.0)
    watch.report(0, at(0), 1.0)
    lag = watch.find(SILENT_S + 0.1)
    assert lag is not None
    assert (lag.suspects, lag.earlier) == ((0,), None)


def test_progress_extends_the_limit_up_to_the_pace_limit() -> None:
    watch = a_watch(1, 1000, step_s=0.001)
    watch.wait(0.0)
    blamed_s = 0.0
    for second in range(1, 60):
        watch.report(0, at(second, 1000), float(second))
        if suspects(watch, float(second)) and not blamed_s:
            blamed_s = second
    assert blamed_s == pytest.approx(PACE_LIMIT[1] * 1.0, abs=1)


def test_oscillating_reports_are_not_progress() -> None:
    watch = decoding(1)
    for quarter in range(40):
        watch.report(0, at(20, 21) if quarter % 2 else at(5, 6), quarter / 4)
    assert suspects(watch, 10.0) == (0,)


def test_claims_beyond_the_input_are_clamped() -> None:
    watch = decoding(2)
    watch.report(0, at(10**6), 1.0)
    assert suspects(watch, SILENT_S + 0.1) == (1,)
    watch.token(21, 3.0)
    watch.wait(3.0)
    watch.report(1, at(21), 4.0)
    assert suspects(watch, 3.0 + REPORTING_S + 0.1) == (0,), "what it claimed then is no progress now"


def test_expected_time_extends_the_limit_up_to_a_cap() -> None:
    watch = a_watch(1, 100, step_s=0.1)
    watch.wait(0.0)
    assert suspects(watch, SILENT_LIMIT[1] * 10 - 0.1) == ()
    assert suspects(watch, SILENT_LIMIT[1] * 10 + 0.1) == (0,)
    for leniency, suspected in ((1.0, (0,)), (2.0, ())):
        watch = StragglerDetector([0], 100_000, lambda _, rows: 0.1 * rows, 0.0, leniency=leniency)
        watch.wait(0.0)
        assert suspects(watch, MOST_LIMIT_S + 0.1) == suspected


def test_time_before_the_wait_does_not_count() -> None:
    watch = decoding()
    watch.wait(1000.0)
    assert suspects(watch, 1000.0 + SILENT_S - 0.1) == ()
    assert watch.still_s(1001.0) == pytest.approx(1.0)


def test_punctual_token_needs_no_estimate() -> None:
    asked: list[int] = []

    def expected_s(stage: int, rows: int) -> float:
        asked.append(stage)
        return STEP_S * rows

    watch = StragglerDetector([0] * 3, 20, expected_s, 0.0)
    for position in range(20, 30):
        watch.wait(float(position))
        watch.token(position, float(position))
    assert not asked
    watch.wait(30.0)
    watch.report(0, at(30), 30.5)
    assert watch.find(31.0) is None
    assert asked


def test_older_stage_that_cannot_report_gets_the_reporting_limit() -> None:
    def silent(unreporting: tuple[int, ...]) -> StragglerDetector:
        watch = StragglerDetector([0, 0], 1000, lambda _, rows: rows * 0.6e-3, 0.0, unreporting=unreporting)
        watch.wait(0.0)
        watch.report(0, at(1000), 0.0)
        return watch

    assert suspects(silent(()), SILENT_S + 0.1) == (1,)
    assert suspects(silent((1,)), REPORTING_LIMIT[1] * 0.6 - 0.1) == ()
    assert suspects(silent((1,)), REPORTING_LIMIT[1] * 0.6 + 0.1) == (1,)
    short = StragglerDetector([0, 0], 20, lambda _, rows: rows * 0.6e-3, 0.0, unreporting=(0, 1))
    short.wait(0.0)
    assert suspects(short, REPORTING_S + 0.1) == (0, 1)


def test_input_still_in_transit_does_not_count_against_a_stage() -> None:
    watch = a_watch(2, 100, step_s=0.0)
    watch.wait(0.0)
    watch.report(0, Progress(received=100, computed=100, sent=0), 0.0)
    watch.report(1, at(0), 0.0)
    assert suspects(watch, SILENT_S + 0.5) == ()
    for second in range(1, 6):
        watch.report(0, Progress(received=100, computed=100, sent=20 * second), float(second))
    assert suspects(watch, 5.0 + SILENT_S - 0.1) == (), "the last of it may just have left"
    assert suspects(watch, 5.0 + SILENT_S + 0.1) == (1,)


def test_stage_behind_a_narrow_link_gets_the_time_of_a_full_step() -> None:
    watch = StragglerDetector([0, 0], 20, lambda _, rows: STEP_S * rows, 0.0, floors_s=[0.0, 4.0])
    watch.token(20, 0.0)
    watch.wait(0.0)
    watch.report(0, at(21), 1.0)
    watch.report(1, at(20), 1.0)
    assert suspects(watch, 3.9) == ()
    assert suspects(watch, 4.1) == (1,)
