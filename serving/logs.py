"""Structured logs: one JSON object a line, with what happened and figures, and never audio, text, tokens or ids."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import TextIO

LOGGER = "moshi_ttt.serving"


class JsonFormatter(logging.Formatter):
    """A line of JSON: time, level, event, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        values = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        values |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            values["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(values, default=str)


def log_as_json(level: int = logging.INFO, stream: TextIO | None = None) -> logging.Handler:
    """Write the server's events to ``stream``, standard error by default. Returns the handler, to be removed."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(LOGGER)
    logger.setLevel(level)
    logger.addHandler(handler)
    return handler


def silent_logger() -> logging.Logger:
    """For a library whose messages quote what a client sent."""
    logger = logging.Logger(f"{LOGGER}.silent")
    logger.addHandler(logging.NullHandler())
    return logger
