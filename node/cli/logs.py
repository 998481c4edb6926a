"""The daemon's log: structlog's events and the libraries' own, in one form, on stderr."""

import logging
import os
import sys
import time

import structlog


def configure_logging(level: str) -> None:
    """Log from `level` on (debug, info, warning or error); libraries from warnings on."""
    threshold = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    if sys.stderr.isatty():
        renderer: structlog.typing.Processor = structlog.dev.ConsoleRenderer(
            colors="NO_COLOR" not in os.environ, timestamp_key="time"
        )
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
