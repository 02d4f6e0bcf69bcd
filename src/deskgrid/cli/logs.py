"""Logs of the programs that run for long: to stderr, so that stdout has only what was asked for."""

from __future__ import annotations

import logging
import sys
from typing import Literal

__all__ = ["LogFormat", "LogLevel", "configure_logs"]

LogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]


def configure_logs(
    *, json: bool, verbose: bool, quiet: bool = False, log_format: LogFormat | None = None, log_level: LogLevel | None = None
) -> None:
    """Write logs to stderr: for people on a terminal, as key=value lines into files, as JSON lines with --json.

    `quiet` leaves only what is wrong, for commands that share the terminal with another program. `log_format` and `log_level` say
    otherwise than the rest.
    """
    import structlog

    json = json if log_format is None else log_format == "json"
    renderer: structlog.typing.Processor
    if json:
        renderer = structlog.processors.JSONRenderer()
    elif sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)  # others show variables: tokens
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    level = logging.getLevelNamesMapping()[log_level.upper()] if log_level is not None else level
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not sys.stderr.isatty() or json:
        processors.append(structlog.processors.format_exc_info)  # the console renderer draws tracebacks itself
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries log in their own way; what they find wrong must be seen too.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
