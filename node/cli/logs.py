"""The daemon's log: structlog's events and the libraries' own, in one form, on stderr."""

import logging
import os
import sys
import time
from threading import Lock

import structlog

from node.util import child_process


def configure_logging(level: str, log_format: str = "text") -> None:
    """Log from `level` on (debug, info, warning or error); libraries from warnings on.

    `log_format`: `text`, which is for people on a terminal and `key=value` elsewhere, or `json`, an object a line.
    """
    threshold = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    if log_format == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
        child_process.relay_line = _log_child_line
    elif sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ, timestamp_key="time")
    else:
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.LogfmtRenderer(key_order=["time", "level", "event"], bool_as_flag=False)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    logging.getLogger("trio.serve_listeners").addFilter(_SeldomWithoutTraceback(10.0))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(threshold, logging.WARNING))
    for name in ("node", "protocol", "selector", "metaswarm"):
        logging.getLogger(name).setLevel(threshold)


def _log_child_line(what: str, line: bytes) -> None:
    if text := line.decode(errors="replace").strip():
        structlog.get_logger(__name__).warning("child output", child=what, line=text)


class ProgressLog:
    """Logs the progress of downloads and the like where no terminal shows bars: when a stage begins, moves and ends.

    Called with (stage, done, total), from any thread.
    """

    def __init__(self, pause_s: float = 10.0) -> None:
        self._pause_s = pause_s
        self._next_s: dict[str, float] = {}
        self._lock = Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Log a line if one is due."""
        if not stage:  # all are over
            return
        with self._lock:
            now_s = time.monotonic()
            is_done = done >= total > 0
            if now_s < self._next_s.get(stage, 0.0) and not is_done:
                return
            if is_done:
                self._next_s.pop(stage, None)
            else:
                self._next_s[stage] = now_s + self._pause_s
        fields = {"percent": done * 100 // total} if total else {"done": done}
        structlog.get_logger(__name__).info("progress", stage=stage, **fields)


class _SeldomWithoutTraceback(logging.Filter):
    """Passes one record per pause: a listener without free files logs ten times a second."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self._pause_s = pause_s
        self._next_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() < self._next_s:
            return False
        self._next_s = time.monotonic() + self._pause_s
        record.exc_info = None
        return True
