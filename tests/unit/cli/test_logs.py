import json
import subprocess
import sys

import pytest

from node.cli.logs import ProgressLog

PROGRAM = """if True:
    import logging, structlog
    from node.cli.logs import configure_logging
    configure_logging({level!r}, {form!r})
    logger = structlog.get_logger("node.somewhere")
    logger.debug("of no interest", peer="12D3")
    logger.info("two words", peer="12D3")
    try:
        1 / 0
    except ZeroDivisionError:
        logger.exception("it broke")
    logging.getLogger("libp2p.somewhere").info("library chatter")
    logging.getLogger("libp2p.somewhere").warning("library %s", "warning")
"""


def log(level: str, form: str = "text") -> list[str]:
    command = [sys.executable, "-c", PROGRAM.format(level=level, form=form)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_logs_own_and_library_events_in_one_format() -> None:
    told, broke, warned = log("info")
    assert 'level=info event="two words" peer=12D3 logger=node.somewhere' in told
    assert 'event="it broke"' in broke
    assert "ZeroDivisionError" in broke
    assert 'level=warning event="library warning" logger=libp2p.somewhere' in warned
    assert told.startswith("time=2")


@pytest.mark.parametrize(("level", "lines"), [("debug", 4), ("warning", 2), ("error", 1)])
def test_filters_by_level(level: str, lines: int) -> None:
    assert len(log(level)) == lines


def test_json_has_an_object_a_line() -> None:
    told, broke, warned = map(json.loads, log("info", "json"))
    assert (told["event"], told["peer"], told["level"]) == ("two words", "12D3", "info")
    assert "ZeroDivisionError" in broke["exception"]
    assert warned["logger"] == "libp2p.somewhere"


def test_output_of_children_is_wrapped_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    program = """if True:
        import trio
        from node.cli.logs import configure_logging
        from node.util.child_process import start
        from node.util.interpreter import python
        configure_logging("info", "json")
        async def main():
            child = await start(python("-c", "import sys; sys.stderr.write('one\\\\ntwo')"), what="the child")
            await child.relay_stderr()
            await child.kill()
        trio.run(main)
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [(line["child"], line["line"]) for line in lines] == [("the child", "one"), ("the child", "two")]


def test_progress_without_a_terminal_is_logged_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLog()
    for done in range(101):
        progress("fetch weights", done, 100)
    progress("", 0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("fetch weights" in line for line in lines), "that all stages are over is no stage"
    assert "percent=0" in lines[0].replace("\x1b[35m", "").replace("\x1b[0m", "").replace("\x1b[36m", "")
