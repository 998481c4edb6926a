import io
import sys

import pytest

from node.cli.output import format_bytes, format_duration, print_error, print_json, printable, progress_bars


def test_an_error_is_one_line_on_stderr_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("two\nlines and \x1b[31mred")
    assert capsys.readouterr() == ("", "metaswarm: two lines and \ufffd[31mred\n")


def test_json_is_one_line_and_keeps_its_letters(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "wörld\n"})
    assert capsys.readouterr().out == '{"text": "wörld\\n"}\n'


def test_a_model_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\r\x9b1mc\n\td…") == "a\ufffd]0;title\ufffdb\ufffd\ufffd1mc\n\td…"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_bytes_are_told_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.354, "0.35 s"), (12.4, "12 s"), (300, "5 min"), (9000, "2.5 h"), (400000, "5 d")]
)
def test_durations_are_told_in_units_that_people_use(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_progress_is_a_line_for_each_stage_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        for done in range(3):
            progress("fetch", done, 2)
        progress("convert", 0, 0)
    assert capsys.readouterr() == ("", "fetch\nconvert\n")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bars() as progress:
        progress("fetch", 1, 2)
        progress("convert", 3, 0)
    assert "fetch" in terminal.getvalue()
    assert "50%" in terminal.getvalue()
    assert "convert" in terminal.getvalue()
