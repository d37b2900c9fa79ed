"""Logging: one JSON object a line on standard output.

Events are static strings, what varies goes into keywords: `log.info("media_processed", media_id=...)`. Never log
secrets, tokens, addresses or bodies. Request-scoped fields (`request_id`, `trace_id`) are bound as context variables
by the middleware and the consumer.
"""

import logging
import sys
from typing import Any

import msgspec
import structlog

from shared import tracing

_encoder = msgspec.json.Encoder(enc_hook=str)


def get_logger(**fields: object) -> Any:
    return structlog.get_logger(**fields)


def setup(service: str, level: str) -> None:
    """Configure both structlog and the standard library's logging; call once a process, before anything logs."""
    number = logging.getLevelNamesMapping()[level.upper()]
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
        logger_factory=structlog.BytesLoggerFactory(sys.stdout.buffer),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[_Bridge()], force=True)


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
        return _encoder.encode(event)

    return render
