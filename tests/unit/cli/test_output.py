import io
import sys

import pytest
from rich.progress import Progress

from node.cli.output import format_bytes, format_duration, print_error, print_json, printable, progress_bars


def test_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("two\nlines and \x1b[31mred")
    assert capsys.readouterr() == ("", "metaswarm: two lines and \ufffd[31mred\n")


def test_json_is_one_line_of_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "wörld\n"})
    assert capsys.readouterr().out == '{"text": "wörld\\n"}\n'


def test_replaces_control_characters() -> None:
    assert printable("a\x1b]0;title\x07b\r\x9b1mc\n\td…") == "a\ufffd]0;title\ufffdb\ufffd\ufffd1mc\n\td…"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_formats_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.354, "0.35 s"), (12.4, "12 s"), (300, "5 min"), (9000, "2.5 h"), (400000, "5 d")]
)
def test_formats_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_progress_without_terminal_is_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        for done in range(3):
            progress("fetch", done, 2)
        progress("convert", 0, 0)
    assert capsys.readouterr() == ("", "fetch\nconvert\n")


def test_progress_on_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_bars_of_a_daemon_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    found: list[Progress] = []
    start = Progress.start

    def start_and_keep(bars: Progress) -> None:
        found.append(bars)
        start(bars)

    def stages() -> list[str]:
        return [task.description for task in found[0].tasks]

    monkeypatch.setattr(Progress, "start", start_and_keep)
    with progress_bars(transient=True) as progress:
        progress("look up somebody/tiny", 0, 0)
        progress("waiting: busy", 0, 0)
        assert stages() == ["waiting: busy"]
        progress("download", 1, 10)
        progress("waiting: busy", 0, 0)
        assert stages() == ["download", "waiting: busy"]
        progress("download", 2, 10)
        assert stages() == ["download"]
        progress("", 0, 0)  # it failed
        assert stages() == []
