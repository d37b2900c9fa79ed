"""What happens around every request of every service: trace, request id, consistency token, deadline, metrics, one log
line, and errors rendered as problem details.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import msgspec
import structlog
from aiohttp import hdrs, web

from shared import consistency, http_client, logs, metrics, tracing
from shared.errors import (
    DeadlineExceeded,
    Malformed,
    MethodNotAllowed,
    NotFound,
    TenfoldError,
    TooLarge,
    Unavailable,
)
from shared.ids import new_text
from shared.logs import get_logger
from shared.resilience.limit import AdaptiveLimit

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = get_logger()

REQUEST_ID = "X-Request-Id"
PROBLEM_JSON = "application/problem+json"
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_POSITIONS = web.RequestKey("positions", consistency.Positions)
_ID = web.RequestKey("request_id", str)
_STARTED = web.RequestKey("started", web.StreamResponse)

# The template of a route, for names in telemetry; the routes whose answer may take as long as it takes; and those that
# are refused under overload.
ROUTE: "WeakKeyDictionary[web.AbstractRoute, str]" = WeakKeyDictionary()
STREAMING: "WeakSet[web.AbstractRoute]" = WeakSet()
LIMITED: "WeakSet[web.AbstractRoute]" = WeakSet()


@dataclass(frozen=True)
class Context:
    service: str
    request_timeout_seconds: float
    limit: AdaptiveLimit


CONTEXT: web.AppKey[Context] = web.AppKey("context", Context)


def problem_response(error: TenfoldError) -> web.Response:
    problem = error.problem()
    return web.Response(
        status=problem.status,
        body=msgspec.json.encode(problem),
        headers={hdrs.CONTENT_TYPE: PROBLEM_JSON, hdrs.CACHE_CONTROL: "no-store", **error.headers},
    )


def request_id(request: web.Request) -> str:
    if _ID not in request:
        request[_ID] = sensible_id(request.headers.get(REQUEST_ID)) or new_text()
    return request[_ID]


def sensible_id(given: str | None) -> str | None:
    """The caller's id where it is sensible."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else None


async def set_answer_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Just before the head of an answer goes out, streams included."""
    request[_STARTED] = response
    response.headers[REQUEST_ID] = request_id(request)
    response.headers["X-Content-Type-Options"] = "nosniff"
    positions = request.get(_POSITIONS)
    if positions is not None and positions.written:
        response.headers[consistency.HEADER] = positions.token()


def _shed(request: web.Request, context: Context) -> web.Response:
    """Refuses before anything is spent on the request, its line in the log included: most of overload is this."""
    metrics.child(metrics.HTTP_SHED, context.service).inc()
    return _refusal(request, Unavailable("overloaded"))


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: it sees the answer that the caller sees."""
    context = request.app[CONTEXT]
    if context.limit.full and request.match_info.route in LIMITED:
        return _shed(request, context)
    route = ROUTE.get(request.match_info.route, "unmatched")
    started = time.perf_counter()
    status = 499  # the caller went away
    with (
        structlog.contextvars.bound_contextvars(request_id=request_id(request)),
        tracing.span(
            f"{request.method} {route}",
            kind=tracing.SpanKind.SERVER,
            parent=tracing.extract(request.headers),
            **{"http.request.method": request.method, "http.route": route},
        ) as span,
        consistency.tracked(request.headers.get(consistency.HEADER)) as positions,
    ):
        request[_POSITIONS] = positions
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            span.set_attribute("http.response.status_code", status)
            seconds = time.perf_counter() - started
            record(
                context.service, request_id(request), tracing.trace_id() or "", request.method, route, status, seconds
            )


def record(service: str, request_id: str, trace_id: str, method: str, route: str, status: int, seconds: float) -> None:
    """What a request leaves behind in metrics and log."""
    counted = method if method in hdrs.METH_ALL else "_OTHER"
    metrics.child(metrics.REQUEST_DURATION, service, counted, route, str(status)).observe(seconds)
    logs.request(request_id, trace_id, method, route, status, seconds)


@web.middleware
async def render_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        seconds = time_allowed(
            request.headers.get(http_client.DEADLINE_HEADER), request.app[CONTEXT].request_timeout_seconds
        )
        with http_client.deadline(seconds):
            if request.match_info.route in STREAMING:
                return await handler(request)
            async with asyncio.timeout(seconds):
                return await handler(request)
    except TenfoldError as error:
        failure = error
    except TimeoutError:
        failure = DeadlineExceeded()
    except web.HTTPException as error:
        failure = _from_aiohttp(error)
    except Exception:
        log.exception("request_failed")
        failure = TenfoldError()
    if _STARTED in request:
        return _cut(request)
    return _refusal(request, failure)


def _refusal(request: web.Request, error: TenfoldError) -> web.Response:
    response = problem_response(error)
    if request.can_read_body and not request.content.at_eof():
        response.force_close()  # what the caller still sends must not be taken for its next request
    return response


def _cut(request: web.Request) -> web.StreamResponse:
    """The head of the answer is out: only a broken connection tells the caller that the rest of it will not come."""
    log.warning("answer_cut")
    if request.transport is not None:
        request.transport.abort()
    return request[_STARTED]


MIDDLEWARES: tuple[Any, ...] = (observe, render_errors)


def time_allowed(given: str | None, longest: float) -> float:
    """Seconds that a request may take, by its `Request-Timeout`. Raises `Malformed`."""
    if given is None:
        return longest
    if not given.isdecimal() or len(given) > 9:
        raise Malformed(f"{http_client.DEADLINE_HEADER} takes milliseconds")
    return min(longest, int(given) / 1000)


def _from_aiohttp(error: web.HTTPException) -> TenfoldError:
    match error.status:
        case 404:
            return NotFound()
        case 405:
            return MethodNotAllowed(headers={hdrs.ALLOW: error.headers.get(hdrs.ALLOW, "")})
        case 413:
            return TooLarge()
        case status if status < 500:
            return Malformed(error.reason)
    log.error("request_failed", status=error.status, reason=error.reason)
    return TenfoldError()
