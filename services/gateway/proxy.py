"""Passes requests on to services and their answers back, streaming both ways.

A body is never kept: it is read from one side as fast as the other takes it, so what a request costs does not depend on
its size. From that follows what can be tried again: whatever no connection could be made for, and reads without a body.

This is the path that nearly every request takes, so it does without objects and layers that the rest of the platform
has: what `shared.middleware` does around a request is done here by `Proxy.answer`.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from services.gateway import answers
from services.gateway import headers as hygiene
from services.gateway.answers import Common
from services.gateway.cors import PREFLIGHT_HEADERS, Cors
from services.gateway.door import Connection, Found
from services.gateway.errors import AnswerBrokeOff, TooSlow
from services.gateway.headers import Client, Seen
from services.gateway.limits import Limits
from services.gateway.settings import Settings
from services.gateway.upstream_pool import Answer, Pool, Unreachable, UpstreamError
from services.gateway.upstreams import RouteClass, Upstream
from shared import http_client, metrics, middleware, tracing
from shared.application import Access, authenticate
from shared.auth import TokenVerifier
from shared.errors import DeadlineExceeded, Malformed, TenfoldError, TooLarge, Unavailable
from shared.logs import get_logger
from shared.resilience import Fleet

log = get_logger()

_SERVICE = "gateway"
_ATTEMPTS = 3
_USER, _OPTIONAL = Access.USER, Access.OPTIONAL
_SAFE = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
_CALLER_GONE = 499

FAILURES = metrics.Counter(
    "tenfold_gateway_upstream_failures_total", "Requests a service did not answer whole", ("upstream", "reason")
)


@dataclass(slots=True)
class Request:
    """A request that is passed on, and what has become of it so far."""

    caller: Connection
    message: RawRequestMessage
    target: str
    found: Found
    id: str
    traceparent: str
    client: Client
    body: "_Body | None" = None
    status: int = _CALLER_GONE
    keep: bool = True
    begun: bool = False  # the answer
    patient: bool = False  # whether a service that does not answer in time has had all the time that it may take


class _Body:
    """The caller's body on its way: counted, and any progress puts the alarm off."""

    def __init__(self, caller: Connection, payload: StreamReader) -> None:
        self._caller = caller
        self._payload = payload
        self._most = 0
        self._idle = 0.0
        self._invites = False
        self._sent = 0
        self.begun = False
        self.finished = False
        self.answered = False

    @property
    def unread(self) -> bool:
        """Whether the caller may still send what must not be taken for its next request."""
        return not self._payload.at_eof()

    def admit(self, most: int, idle: float, *, invites: bool) -> None:
        """At most `most` bytes, and `idle` seconds without any; `invites`: the caller waits to be told to send it."""
        self._most, self._idle, self._invites = most, idle, invites

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        try:
            if self._invites:
                # Only now that token, rate and size are found good and a service takes the body.
                self._caller.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            async for chunk in self._payload.iter_any():
                self._sent += len(chunk)
                if self._sent > self._most:
                    raise TooLarge(f"at most {self._most} bytes")
                self._progress()
                yield chunk
                self._progress()
        except (web.PayloadAccessError, web.RequestPayloadError, aiohttp.ClientError, OSError, ValueError) as error:
            raise Malformed("the body is not whole") from error
        self.finished = True

    def _progress(self) -> None:
        # While the body moves the service need not answer; what counts is that it moves.
        if not self.answered:
            self._caller.alarm.set(self._idle)


class Proxy:
    """Requests for one service."""

    def __init__(
        self,
        upstream: Upstream,
        settings: Settings,
        fleet: Fleet[Pool],
        verifier: TokenVerifier,
        limits: Limits,
        cors: Cors,
        common: Common,
    ) -> None:
        self.prefixes = upstream.prefixes
        self._name = upstream.name
        self._trusted_proxies = settings.trusted_proxies
        self._seconds = settings.request_timeout_seconds
        self._idle = settings.idle_seconds
        self._most = {
            route_class: settings.upload_max_bytes if route_class is RouteClass.UPLOAD else settings.max_body_bytes
            for route_class in RouteClass
        }
        self._verifier = verifier
        self._limits = limits
        self._cors = cors
        self._common = common
        self._fleet = fleet
        self._event_streams: set[Connection] = set()

    async def end_event_streams(self, _app: web.Application) -> None:
        """They would never end by themselves. Who follows one takes it up again at another gateway."""
        for caller in list(self._event_streams):
            if caller.transport is not None:
                caller.transport.close()

    async def answer(
        self, caller: Connection, message: RawRequestMessage, payload: StreamReader, target: str, found: Found
    ) -> bool:
        """Answer one request; whether its connection may be kept."""
        started = time.perf_counter()
        headers = message.headers
        above = tracing.extract(headers)
        unsampled = tracing.unsampled(above)
        client = hygiene.client_of(caller.address, caller.scheme, headers, self._trusted_proxies)
        request_id = middleware.sensible_id(headers.get(middleware.REQUEST_ID))
        request = Request(caller, message, target, found, request_id, unsampled or "", client)
        if payload is not EMPTY_PAYLOAD and not payload.at_eof():
            request.body = _Body(caller, payload)
        caller.begins(payload)
        try:
            if unsampled is None:
                await self._sampled(request, above)
            else:
                await self._answer(request)
        finally:
            caller.ends()
            seconds = time.perf_counter() - started
            trace_id = request.traceparent[3:35]
            middleware.record(_SERVICE, request_id, trace_id, message.method, found.route, request.status, seconds)
        return request.keep

    async def _sampled(self, request: Request, above: str) -> None:
        """As `_answer`, in a span."""
        method, route = request.message.method, request.found.route
        with tracing.sampled_span(
            f"{method} {route}",
            kind=tracing.SpanKind.SERVER,
            parent=above,
            **{"http.request.method": method, "http.route": route},
        ) as span:
            request.traceparent = tracing.traceparent() or ""
            try:
                await self._answer(request)
            finally:
                span.set_attribute("http.response.status_code", request.status)

    async def _answer(self, request: Request) -> None:
        try:
            if self._cors and self._cors.asks_first(request.message.method, request.message.headers):
                self._write(request, 204, answers.first_line(204) + answers.lines(PREFLIGHT_HEADERS), b"", 0)
            else:
                await self._pass(request)
        except ConnectionError:
            raise  # the caller's: those of services have become other errors
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, TenfoldError):
            log.error("request_failed", request_id=request.id, exc_info=error)
        if request.begun:
            # The head is out: only a broken connection tells the caller that the rest will not come.
            log.warning("answer_cut", request_id=request.id)
            request.caller.abort()
            request.keep = False
            return
        failure = error if isinstance(error, TenfoldError) else TenfoldError()
        head, body = answers.problem(failure)
        self._write(request, failure.status, head, body, Seen.DATE)

    async def _pass(self, request: Request) -> None:
        """Refuse what may be refused before a service hears of it; pass on the rest, and its answer back."""
        message, found, body = request.message, request.found, request.body
        headers = message.headers
        hygiene.check_head(headers)
        if found.climbs:
            raise Malformed("the path holds dot segments or control characters")
        expects = hdrs.EXPECT in headers
        if expects and headers[hdrs.EXPECT].lower() != "100-continue":
            raise Malformed("only 100-continue can be expected")
        seconds = middleware.time_allowed(headers.get(http_client.DEADLINE_HEADER), self._seconds)
        authorization, access = headers.get(hdrs.AUTHORIZATION), found.rule.access
        principal = request.caller.principal(authorization) if access is _USER or access is _OPTIONAL else None
        if principal is None:
            principal = await authenticate(authorization, access, self._verifier)
            if principal is not None and authorization is not None:
                request.caller.proven(authorization, principal)
        standing = await self._limits.hit(found.rule.route_class, principal, request.client.address)
        lines = hygiene.to_service(message.raw_headers, connection=hdrs.CONNECTION in headers)
        lines += hygiene.lines_of(request.client)
        if hdrs.COOKIE in headers:
            lines += hygiene.consistency_lines(headers)
        lines.append(b"X-Request-Id: " + request.id.encode())
        lines.append(b"traceparent: " + request.traceparent.encode())
        lines.append(b"Request-Timeout: %d" % max(1, int(seconds * 1000)))
        chunked = False
        if body is not None:
            most = self._most[found.rule.route_class]
            length = headers.get(hdrs.CONTENT_LENGTH)
            if length is None:
                chunked = True
            elif int(length) > most:
                raise TooLarge(f"at most {most} bytes")
            else:
                lines.append(b"Content-Length: " + length.encode())
            body.admit(most, min(seconds, self._idle), invites=expects)
        request.patient = seconds >= self._seconds
        alarm = request.caller.alarm
        alarm.set(seconds)
        try:
            answer = await self._ask(request, lines, body, chunked=chunked)
        except asyncio.CancelledError:
            if not alarm.rang():
                raise
            raise self._too_late(body) from None
        finally:
            alarm.off()
            if body is not None:
                body.answered = True
        try:
            head, seen = self._head(request, answer, standing.lines())
            whole = answer.ready()
            if whole is not None and not answer.bodyless:
                # An answer that is here already, as most are, goes out in one write with its head.
                self._write(request, answer.status, head + b"Content-Length: %d\r\n" % len(whole), whole, seen)
            else:
                await self._pass_back(request, answer, head, seen)
        finally:
            answer.close()

    def _too_late(self, body: _Body | None) -> TenfoldError:
        metrics.child(FAILURES, self._name, "timeout").inc()
        if body is not None and body.begun and not body.finished:
            return TooSlow()
        return DeadlineExceeded(f"{self._name} did not answer in time")

    async def _ask(self, request: Request, lines: list[bytes], body: _Body | None, *, chunked: bool) -> Answer:
        """The head of the service's answer. Raises `Unavailable` when there is none, or none is to be asked for."""
        method, fleet, answer = request.message.method, self._fleet, None
        # Not DELETE and PUT, though idempotent: the second one's answer would be another (404, 412).
        repeatable = body is None and method in _SAFE
        tried: tuple[Pool, ...] = ()
        fleet.enter()
        # A body goes at its caller's pace, so it must not take a place that others wait for.
        began = fleet.take() if body is None else None
        try:
            for attempt in range(_ATTEMPTS):
                if attempt and not fleet.try_again():
                    break
                instance = fleet.instances.choose(tried) or (fleet.instances.choose() if repeatable else None)
                if instance is None:
                    break
                try:
                    answer = await instance.ask(
                        method, request.target, lines, body, chunked=chunked, repeatable=repeatable
                    )
                except Unreachable as error:
                    fleet.failed(instance)
                    self._failed(request, "unreachable", error)
                except UpstreamError as error:
                    self._failed(request, "no_answer", error)
                    if body is not None and not body.finished:
                        # It may be what the caller did that it broke off for, and nobody is to get a service closed so.
                        raise Unavailable(f"{self._name} broke off") from None
                    fleet.failed(instance)
                    if not repeatable:
                        break
                except asyncio.CancelledError:
                    if request.patient and request.caller.alarm.ringing and (body is None or body.finished):
                        fleet.failed(instance)
                        fleet.breaker.failed()
                    raise
                else:
                    fleet.answered(instance, answer.status, closes=answer.closes)
                    return answer
                tried += (instance,)
        finally:
            if began is not None and answer is None:
                fleet.limit.give_up(request.found.rule.path, began)
            elif began is not None:
                fleet.limit.give(request.found.rule.path, began)
        fleet.breaker.failed()
        raise Unavailable(f"{self._name} does not answer")

    def _failed(self, request: Request, reason: str, error: Exception) -> None:
        metrics.child(FAILURES, self._name, reason).inc()
        log.warning(
            "upstream_failed", upstream=self._name, reason=reason, error=repr(error), request_id=request.id,
            trace_id=request.traceparent[3:35],
        )  # fmt: skip

    def _head(self, request: Request, answer: Answer, standing: bytes) -> tuple[bytes, int]:
        """What goes back of the head of an answer, without framing; and which of `Seen` it has."""
        lines, seen = hygiene.to_caller(answer.headers)
        if seen & Seen.CONSISTENCY_TOKEN and (token := answer.get(b"consistency-token")) is not None:
            cookie = hygiene.set_cookie(token, request.client.scheme)
            if cookie is not None:
                lines.append(cookie)
        lines.append(standing)
        return answers.first_line(answer.status, answer.reason) + b"\r\n".join(lines), seen

    async def _pass_back(self, request: Request, answer: Answer, head: bytes, seen: int) -> None:
        """An answer without a body, or with one that is still to come."""
        length = answer.get(b"content-length") if answer.status != 204 else None
        if length is not None:
            head += b"Content-Length: %b\r\n" % length
        if answer.bodyless:
            self._write(request, answer.status, head, b"", seen)
            return
        chunked = length is None and request.message.version >= HttpVersion11
        if chunked:
            head += b"Transfer-Encoding: chunked\r\n"
        elif length is None:
            request.keep = False  # its end is the connection's
        self._write(request, answer.status, head, b"", seen)
        streams = seen & Seen.CONTENT_TYPE and (answer.get(b"content-type") or b"").startswith(b"text/event-stream")
        if streams:
            self._event_streams.add(request.caller)
        try:
            await self._stream(request, answer, chunked=chunked)
        finally:
            self._event_streams.discard(request.caller)

    async def _stream(self, request: Request, answer: Answer, *, chunked: bool) -> None:
        caller = request.caller
        try:
            while True:
                caller.alarm.set(self._idle)
                chunk = await answer.chunk()
                if not chunk:
                    break
                caller.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
                await caller.drained()
        except UpstreamError as error:
            self._failed(request, "broke_off", error)
            raise AnswerBrokeOff from error
        except asyncio.CancelledError:
            if not caller.alarm.rang():
                raise
            self._failed(request, "broke_off", TimeoutError())
            raise AnswerBrokeOff from None
        finally:
            caller.alarm.off()
        if chunked:
            caller.write(b"0\r\n\r\n")

    def _write(self, request: Request, status: int, head: bytes, body: bytes, seen: int) -> None:
        """The rest of the head, and what there is of the body. `seen`: what `head` has already."""
        message, caller = request.message, request.caller
        request.begun, request.status = True, status
        # An upgrade is nothing we do: what follows it is no HTTP any more.
        if (
            message.should_close
            or message.upgrade
            or caller.draining
            or (request.body is not None and request.body.unread)
        ):
            request.keep = False
        head += self._common.lines(seen, request.id, request.client.scheme, message.headers.get(hdrs.ORIGIN))
        if not seen & Seen.DATE:
            head += answers.date()
        if not request.keep:
            head += b"Connection: close\r\n"
        elif message.version < HttpVersion11:
            head += b"Connection: keep-alive\r\n"
        caller.write(head + b"\r\n" if message.method == hdrs.METH_HEAD else b"%b\r\n%b" % (head, body))
