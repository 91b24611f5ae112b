import io
import json
import logging

import pytest

from engine.errors import DeviceError
from engine.observe.logs import RequestLine, log_request, start

LINE = RequestLine("r-1", "stop", 12, 8, 34, 0.001, 0.0212345678, 0.5, revision="abc")


@pytest.fixture
def lines():
    """Starts the logger on a stream and reads what it wrote; the logger is left as it was."""
    logger = logging.getLogger("serac")
    before = (logger.handlers[:], logger.level, logger.propagate)
    stream = io.StringIO()

    def begin(form: str):
        return start(stream, form), lambda: stream.getvalue().splitlines()

    yield begin
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_a_request_is_one_line_of_json(lines):
    logger, read = lines("json")
    log_request(logger, LINE)
    (line,) = read()
    fields = json.loads(line)
    assert fields["message"] == "request" and fields["level"] == "info" and fields["time"].endswith("+00:00")
    assert (fields["request_id"], fields["completion_tokens"], fields["first_token_s"]) == ("r-1", 34, 0.021235)
    assert "code" not in fields, "what is empty is left out"


def test_a_request_is_one_line_of_text(lines):
    logger, read = lines("text")
    log_request(logger, LINE)
    (line,) = read()
    assert " info serac request request_id=r-1 outcome=stop prompt_tokens=12 cached_tokens=8 " in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_holds_only_named_fields_and_no_foreign_message(lines, form):
    logger, read = lines(form)
    try:
        raise ValueError("the canary prompt")
    except ValueError:
        logger.exception("a step failed", extra={"prompt": "the canary prompt", "lane": 1})
    (line,) = read()
    assert "canary" not in line
    assert "ValueError < test_logs.py:" in line and "test_a_line_holds" in line and "lane" in line


def test_our_own_error_says_its_message(lines):
    logger, read = lines("text")
    try:
        raise DeviceError("device 3: gone")
    except DeviceError:
        logger.exception("a step failed")
    assert "error=DeviceError: device 3: gone < test_logs.py:" in read()[0]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_break_in_a_value_makes_no_second_line(lines, form):
    logger, read = lines(form)
    log_request(logger, RequestLine("r\n2026 error serac forged", "stop", 1, 0, 1, 0.0, None, 0.1))
    assert len(read()) == 1


def test_starting_twice_writes_each_line_once_and_tells_the_root_nothing(lines, caplog):
    lines("text")
    _, read = lines("text")
    logging.getLogger("serac.replica").warning("once")
    assert len(read()) == 1 and not caplog.records
