"""Logging: one JSON object a line on standard output.

Events are static strings, what varies goes into keywords: `log.info("media_processed", media_id=...)`. Never log
secrets, tokens, addresses or bodies. Request-scoped fields (`request_id`, `trace_id`) are bound as context variables
by the middleware and the consumer. The lines of one turn of the event loop go out in one write.
"""

import asyncio
import atexit
import logging
import sys
from datetime import UTC, datetime
from typing import Any, BinaryIO

import msgspec
import structlog

from shared import tracing

_encoder = msgspec.json.Encoder(enc_hook=str)


class _Output:
    """Lines to `file`, those of one turn of the loop together. Has the methods that structlog asks of a logger."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[bytes] = []

    def line(self, line: bytes) -> None:
        if not self._lines:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:  # no loop, or another thread's
                self._file.write(line + b"\n")
                self._file.flush()
                return
        self._lines.append(line)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._file.write(b"\n".join([*lines, b""]))
            self._file.flush()

    debug = info = warning = error = critical = line


class _Request(msgspec.Struct):
    """The access log: one line a request, always of this shape, which is why it costs a fifth of other lines."""

    service: str
    event: str
    level: str
    timestamp: datetime
    request_id: str
    trace_id: str
    method: str
    route: str
    status: int
    milliseconds: float


_output: _Output | None = None
_service = ""


def get_logger(**fields: object) -> Any:
    return structlog.get_logger(**fields)


def setup(service: str, level: str) -> None:
    """Configure both structlog and the standard library's logging; call once a process, before anything logs."""
    global _output, _service
    number = logging.getLevelNamesMapping()[level.upper()]
    output = _Output(sys.stdout.buffer)
    atexit.register(output.flush)
    _output, _service = output if number <= logging.INFO else None, service
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            structlog.processors.format_exc_info,
            _render(service),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # Writing bytes skips the standard library's logging: 8 us a line instead of 24.
        logger_factory=lambda: output,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[_Bridge()], force=True)


def request(request_id: str, trace_id: str, method: str, route: str, status: int, seconds: float) -> None:
    """The line of the access log for one request."""
    if _output is not None:
        line = _Request(
            _service, "request", "info", datetime.now(UTC), request_id, trace_id, method, route, status,
            round(seconds * 1000, 1),
        )  # fmt: skip
        _output.line(_encoder.encode(line))


class _Bridge(logging.Handler):
    """Hands what libraries log through the standard library to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(library=record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def _add_trace(_logger: Any, _method: str, event: Any) -> Any:
    if (trace_id := tracing.trace_id()) is not None:
        event["trace_id"] = trace_id
    return event


def _render(service: str) -> Any:
    def render(_logger: Any, _method: str, event: dict[str, Any]) -> bytes:
        event.setdefault("service", service)
        try:
            return _encoder.encode(event)
        except (ValueError, TypeError, OverflowError, RecursionError):  # a lone surrogate, say
            # Who logs, often of another error, must not fail of it.
            return _encoder.encode({n: v if isinstance(v, str) and v.isascii() else ascii(v) for n, v in event.items()})

    return render
