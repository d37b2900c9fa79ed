"""Server-sent events: framing, and the answer that writes them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

from aiohttp import hdrs, web

from services.notifier.models import StreamEntry
from shared import metrics
from shared.logs import get_logger

log = get_logger()

LAST_EVENT_ID = "Last-Event-ID"
HEARTBEAT = b":\n\n"
_RETRY_MS = 2000
_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Accel-Buffering": "no",  # else nginx collects what should go out at once
}

OPEN = metrics.Gauge("tenfold_notifier_streams", "Open live streams")
DROPPED = metrics.Counter("tenfold_notifier_streams_dropped_total", "Streams dropped because nobody read them")


def preamble(start: int) -> bytes:
    """Tells a client its position before the first event, so that one lost early resumes without a gap."""
    return f"retry: {_RETRY_MS}\nid: {start}\n\n".encode()


def frame(entry: StreamEntry) -> bytes:
    return f"id: {entry.position}\nevent: {entry.event}\ndata: {entry.data}\n\n".encode()


async def respond(
    request: web.Request, start: int, batches: AsyncGenerator[Sequence[StreamEntry]], write_seconds: float
) -> web.StreamResponse:
    """Write the batches as they come, a heartbeat for an empty one, until they end or nobody reads any more."""
    response = web.StreamResponse(headers=_HEADERS)
    async with aclosing(batches):
        await anext(batches)  # what is refused is refused here, while there can be another answer
        with OPEN.track_inprogress():
            # From here on, whatever happens, the stream ends, and the client takes it up anew.
            try:
                await response.prepare(request)
                await _write(response, preamble(start), write_seconds)
                async for batch in batches:
                    await _write(response, b"".join(map(frame, batch)) or HEARTBEAT, write_seconds)
                await response.write_eof()
            except TimeoutError:
                DROPPED.inc()
                _cut(request)
            except ConnectionError:
                _cut(request)
            except Exception:
                log.exception("stream_failed")
                _cut(request)
    return response


async def _write(response: web.StreamResponse, data: bytes, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await response.write(data)


def _cut(request: web.Request) -> None:
    """Close without sending what is buffered: nobody reads it."""
    with suppress(AttributeError):
        if request.transport is not None:
            request.transport.abort()
