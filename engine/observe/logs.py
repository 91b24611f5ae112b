"""Writes log lines, as JSON or as text: one a line, one for each request, never a prompt.

A line holds the time, level, logger and message, and those of the record's extras that FIELDS names; whatever else
a caller attaches stays out. Of an exception it shows the type and the places it passed, and its message only if it
is one of ours: theirs may quote their input. Cost: 20 us a line.
"""

import json
import logging
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TextIO

from engine.errors import SeracError, shown

FORMS = ("text", "json")
MAX_FRAMES = 8


@dataclass(frozen=True, slots=True)
class RequestLine:
    """What is known of a request when it has ended. Seconds count from its admission."""

    request_id: str
    outcome: str  # one of engine.observe.metrics.OUTCOMES
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float | None
    total_s: float
    revision: str = ""
    code: str = ""  # gRPC status of a request that failed


FIELDS = (*RequestLine.__dataclass_fields__, "lane", "step", "address", "signal", "seconds", "count")


def log_request(logger: logging.Logger, line: RequestLine) -> None:
    """The one line of a request."""
    logger.info("request", extra=asdict(line))


def failure(error: BaseException) -> str:
    """An exception's type, its message when it is ours, and the places that it passed, innermost first."""
    said = f": {error}" if isinstance(error, SeracError) else ""
    frames = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
        for frame in reversed(traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:])
    ]
    return type(error).__name__ + said + "".join(f" < {frame}" for frame in frames)


class Lines:
    """A formatter for the standard library's handlers. `form` is one of FORMS."""

    def __init__(self, form: str = "text"):
        assert form in FORMS, form
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extras = {name: getattr(record, name) for name in FIELDS if getattr(record, name, None) not in (None, "")}
        fields |= {name: round(x, 6) if isinstance(x, float) else x for name, x in extras.items()}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = failure(record.exc_info[1])
        if self._json:
            return json.dumps(fields, default=str)
        head = f"{fields.pop('time')} {fields.pop('level')} {fields.pop('logger')} {_plain(fields.pop('message'))}"
        return head + "".join(f" {name}={_plain(value)}" for name, value in fields.items())


def _plain(value: object) -> str:
    """`value` on one line: a line break in it cannot make a second one."""
    text = str(value)
    return text if text.isprintable() else shown(text)


def start(stream: TextIO, form: str = "text", level: str = "info") -> logging.Logger:
    """Send the lines of the logger `serac`, and of nobody else's, to `stream`; calling it again replaces that."""
    logger = logging.getLogger("serac")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(form))  # type: ignore[arg-type]  # anything with a `format` will do
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    return logger
