"""Logs of the serving process: one JSON object a line, on stderr. They hold neither bodies nor keys."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

REQUESTS = logging.getLogger("encode.serving.requests")
logging.getLogger("encode.serving").addHandler(logging.NullHandler())  # silent where no server has set up logs


class JsonLines(logging.Formatter):
    """A record as JSON: time (UTC), level, and its `fields`, or else logger and message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        line |= {"logger": record.name, "message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_request(status: int, fields: dict[str, Any]) -> None:
    """Write the line of one request; a fault is an error, a refusal a warning."""
    level = logging.ERROR if status == 500 else logging.WARNING if status >= 400 else logging.INFO
    REQUESTS.log(level, "request", extra={"fields": fields})


def log_config() -> dict[str, Any]:
    """Return the settings of `logging.config.dictConfig` for a serving process."""
    own = {"handlers": ["stderr"], "level": "INFO", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonLines}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "loggers": {"uvicorn": own, "encode.serving": own},
    }
