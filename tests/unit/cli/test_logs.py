import subprocess
import sys

import pytest

PROGRAM = """if True:
    import logging, structlog
    from node.cli.logs import configure_logging
    configure_logging({level!r})
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


def log(level: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM.format(level=level)]
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
