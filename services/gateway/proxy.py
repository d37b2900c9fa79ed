"""Passes requests on to services and their answers back, streaming both ways.

A body is never kept: it is read from one side as fast as the other takes it, so what a request costs does not depend on
its size. From that follows what can be tried again: whatever no connection could be made for, and reads without a body.

This is the path that nearly every request takes, so it does without objects and layers that the rest of the platform
has: what `shared.middleware` does around a request is done here by `Proxy.answer`.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

import aiohttp
import msgspec
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from services.gateway import answers
from services.gateway import headers as hygiene
from services.gateway.answers import Common
from services.gateway.cors import PREFLIGHT_HEADERS, Cors
from services.gateway.door import Connection, Found
from services.gateway.errors import AnswerBrokeOff, TooSlow
from services.gateway.headers import Head, Seen
from services.gateway.limits import Limits, Standing
from services.gateway.settings import Settings
from services.gateway.upstream_pool import Answer, Pool, Unreachable, UpstreamError
from services.gateway.upstreams import RouteClass, Upstream
from shared import metrics, middleware, tracing
from shared.application import Access, authenticate
from shared.auth import Principal, TokenVerifier
from shared.errors import DeadlineExceeded, Malformed, TenfoldError, TooLarge, Unavailable
from shared.ids import new_text
from shared.logs import get_logger
from shared.resilience import Fleet

log = get_logger()

_SERVICE = "gateway"
_ATTEMPTS = 3
_PUBLIC, _USER, _OPTIONAL = Access.PUBLIC, Access.USER, Access.OPTIONAL
_SAFE = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
_CALLER_GONE = 499

FAILURES = metrics.Counter(
    "tenfold_gateway_upstream_failures_total", "Requests a service did not answer whole", ("upstream", "reason")
)


class Request(msgspec.Struct, eq=False):
    """A request that is passed on, and what has become of it so far."""

    proxy: "Proxy"
    caller: Connection
    message: RawRequestMessage
    target: str
    found: Found
    head: Head
    id: str
    traceparent: str  # empty: it is sampled, and a span says it
    started: float
    body: "_Body | None" = None
    lines: bytes = b""  # for the service
    standing: bytes | None = None  # once it is admitted
    entered: bool = False  # among those that ask the service
    place: float | None = None  # among those under way
    asked: "tuple[Pool, Answer] | None" = None  # without a task
    cancelled: bool = False  # while it was on its way without a task
    status: int = _CALLER_GONE
    keep: bool = True
    begun: bool = False  # the answer

    @property
    def patient(self) -> bool:
        """Whether a service that does not answer in time has had all the time that it may take."""
        return self.head.seconds >= self.proxy.seconds


class _Body:
    """The caller's body on its way: counted, and any progress puts the alarm off."""

    def __init__(self, caller: Connection, payload: StreamReader) -> None:
        self._caller = caller
        self._payload = payload
        self._most = 0
        self._idle = 0.0
        self._invites = False
        self._sent = 0
        self.chunked = False
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
        self.seconds = settings.request_timeout_seconds
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

    def request(self, caller: Connection, message: RawRequestMessage, target: str, found: Found) -> Request:
        head = caller.head(message, self._trusted_proxies, self.seconds)
        traceparent = tracing.unsampled(head.above) or ""
        request_id = head.request_id or new_text()
        return Request(self, caller, message, target, found, head, request_id, traceparent, time.perf_counter())

    async def answer(
        self, caller: Connection, message: RawRequestMessage, payload: StreamReader, target: str, found: Found
    ) -> bool:
        """Answer one request; whether its connection may be kept."""
        request = self.request(caller, message, target, found)
        if payload is not EMPTY_PAYLOAD and not payload.at_eof():
            request.body = _Body(caller, payload)
        caller.begins(payload)
        return await self.rest(request)

    # Without a task: what most requests need is a limit and an answer that comes in one piece, and for neither of the
    # two anything has to be woken. Whatever else comes up, `rest` goes on from there.

    def begin(self, request: Request) -> None:
        """Pass on a request without a body, as far as it goes."""
        head, found, principal = request.head, request.found, self._known(request)
        access = found.rule.access
        anonymous = access is _PUBLIC or (access is _OPTIONAL and head.authorization is None)
        if (
            (principal is None and not anonymous)
            or head.expects
            or head.fault is not None
            or found.climbs
            or not request.traceparent
            or request.message.method == hdrs.METH_OPTIONS
        ):
            request.caller.hand_over()
        else:
            self._limits.ask(found.rule.route_class, principal, head.client.address, partial(self._limited, request))

    def _limited(self, request: Request, standing: Standing) -> None:
        if request.caller.woken:
            return  # the caller has gone
        answer = None
        try:
            standing.check()
            self._admitted(request, standing)
            self._enter(request)
            instance = self._fleet.instances.choose()
            if instance is not None:
                answer = instance.begin(request.message.method, request.target, request.lines)
        except Exception as error:  # noqa: BLE001 - the caller is told
            self._end(request, error)
            return
        if instance is None or answer is None:
            request.caller.hand_over()
            return
        request.asked = instance, answer
        request.caller.alarm.set(request.head.seconds)
        answer.tell = partial(self._answered, request)

    def _answered(self, request: Request) -> None:
        assert request.asked is not None
        instance, answer = request.asked
        if request.caller.woken or (whole := answer.ready()) is None:
            request.caller.hand_over()
            return
        failure: Exception | None = None
        try:
            self._took(request, instance, answer)
            self._write_whole(request, answer, whole)
        except Exception as error:  # noqa: BLE001 - the caller is told
            failure = error
        answer.close()
        self._end(request, failure)

    def _end(self, request: Request, failure: Exception | None) -> None:
        try:
            if failure is not None:
                self._fail(request, failure)
        except ConnectionError:
            request.keep = False
        self._finish(request)
        request.caller.passed(keep=request.keep)

    async def rest(self, request: Request) -> bool:
        """Answer it, from wherever it has got to; whether its connection may be kept."""
        try:
            if request.cancelled and request.asked is None:
                raise asyncio.CancelledError
            if request.traceparent:
                await self._answer(request)
            else:
                await self._sampled(request)
        finally:
            self._finish(request)
        return request.keep

    def _finish(self, request: Request) -> None:
        if request.place is not None:
            self._give_up(request, request.place)
        request.caller.ends()
        seconds = time.perf_counter() - request.started
        method, route, trace_id = request.message.method, request.found.route, request.traceparent[3:35]
        middleware.record(_SERVICE, request.id, trace_id, method, route, request.status, seconds)

    async def _sampled(self, request: Request) -> None:
        """As `_answer`, in a span."""
        method, route = request.message.method, request.found.route
        with tracing.sampled_span(
            f"{method} {route}",
            kind=tracing.SpanKind.SERVER,
            parent=request.head.above,
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
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if isinstance(error, ConnectionError):
            raise error  # the caller's: those of services have become other errors
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
        if request.standing is None:
            await self._admit(request)
        alarm, body = request.caller.alarm, request.body
        alarm.set(request.head.seconds)
        try:
            answer = await self._ask(request)
        except asyncio.CancelledError:
            if not alarm.rang():
                raise
            raise self._too_late(body) from None
        finally:
            alarm.off()
            if body is not None:
                body.answered = True
        try:
            whole = answer.ready()
            if whole is not None:
                self._write_whole(request, answer, whole)
            else:
                await self._pass_back(request, answer)
        finally:
            answer.close()

    async def _admit(self, request: Request) -> None:
        head, found = request.head, request.found
        if head.fault is not None:
            raise head.fault()
        if found.climbs:
            raise Malformed("the path holds dot segments or control characters")
        principal = self._known(request)
        if principal is None:
            principal = await authenticate(head.authorization, found.rule.access, self._verifier)
            if principal is not None and head.authorization is not None:
                request.caller.proven(head.authorization, principal)
        self._admitted(request, await self._limits.hit(found.rule.route_class, principal, head.client.address))

    def _known(self, request: Request) -> Principal | None:
        """Who asks, where the connection has shown the same token before."""
        access = request.found.rule.access
        return request.caller.principal(request.head.authorization) if access is _USER or access is _OPTIONAL else None

    def _admitted(self, request: Request, standing: Standing) -> None:
        head, body = request.head, request.body
        request.lines = head.lines + f"X-Request-Id: {request.id}\r\ntraceparent: {request.traceparent}\r\n".encode()
        if body is not None:
            most = self._most[request.found.rule.route_class]
            length = request.message.headers.get(hdrs.CONTENT_LENGTH)
            if length is None:
                body.chunked = True
            elif int(length) > most:
                raise TooLarge(f"at most {most} bytes")
            else:
                request.lines += b"Content-Length: %b\r\n" % length.encode()
            body.admit(most, min(head.seconds, self._idle), invites=head.expects)
        request.standing = standing.lines()

    def _too_late(self, body: _Body | None) -> TenfoldError:
        metrics.child(FAILURES, self._name, "timeout").inc()
        if body is not None and body.begun and not body.finished:
            return TooSlow()
        return DeadlineExceeded(f"{self._name} did not answer in time")

    def _enter(self, request: Request) -> None:
        """Raises `Unavailable` when the service is not to be asked."""
        self._fleet.enter()
        request.entered = True
        if request.body is None:  # one goes at its caller's pace, so it must not take a place that others wait for
            request.place = self._fleet.take()

    def _took(self, request: Request, instance: Pool, answer: Answer) -> None:
        """`instance` has answered."""
        self._fleet.answered(instance, answer.status, closes=answer.closes)
        if request.place is not None:
            self._fleet.limit.give(request.found.rule.path, request.place)
            request.place = None

    def _give_up(self, request: Request, place: float) -> None:
        self._fleet.limit.give_up(request.found.rule.path, place)
        request.place = None

    async def _ask(self, request: Request) -> Answer:
        """The head of the service's answer. Raises `Unavailable` when there is none, or none is to be asked for."""
        method, body, fleet = request.message.method, request.body, self._fleet
        # Not DELETE and PUT, though idempotent: the second one's answer would be another (404, 412).
        repeatable = body is None and method in _SAFE
        tried: tuple[Pool, ...] = ()
        if not request.entered:
            self._enter(request)
        try:
            for attempt in range(_ATTEMPTS):
                if attempt and not fleet.try_again():
                    break
                asked, request.asked = request.asked, None
                instance, begun = asked or (
                    fleet.instances.choose(tried) or (fleet.instances.choose() if repeatable else None), None,
                )  # fmt: skip
                if instance is None:
                    break
                try:
                    if request.cancelled and begun is not None:
                        begun.close()
                        raise asyncio.CancelledError
                    answer = await instance.ask(
                        method, request.target, request.lines, body, chunked=body is not None and body.chunked,
                        repeatable=repeatable, begun=begun,
                    )  # fmt: skip
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
                    self._took(request, instance, answer)
                    return answer
                tried += (instance,)
        finally:
            if request.place is not None:
                self._give_up(request, request.place)
        fleet.breaker.failed()
        raise Unavailable(f"{self._name} does not answer")

    def _failed(self, request: Request, reason: str, error: Exception) -> None:
        metrics.child(FAILURES, self._name, reason).inc()
        log.warning(
            "upstream_failed", upstream=self._name, reason=reason, error=repr(error), request_id=request.id,
            trace_id=request.traceparent[3:35],
        )  # fmt: skip

    def _head(self, request: Request, answer: Answer) -> bytes:
        """What goes back of the head of an answer."""
        lines = answer.back
        if answer.seen & Seen.CONSISTENCY_TOKEN and (token := answer.get(b"consistency-token")) is not None:
            cookie = hygiene.set_cookie(token, request.head.client.scheme)
            if cookie is not None:
                lines.append(cookie)
        assert request.standing is not None
        return b"\r\n".join([answer.first, *lines, request.standing])

    def _write_whole(self, request: Request, answer: Answer, body: bytes) -> None:
        """An answer that is here already, as most are: it goes out in one write."""
        head = self._head(request, answer)
        if not answer.seen & Seen.CONTENT_LENGTH and not answer.bodyless:
            head += b"Content-Length: %d\r\n" % len(body)
        self._write(request, answer.status, head, body, answer.seen)

    async def _pass_back(self, request: Request, answer: Answer) -> None:
        """An answer whose body is still to come."""
        head, seen = self._head(request, answer), answer.seen
        unbounded = not seen & Seen.CONTENT_LENGTH
        chunked = unbounded and request.message.version >= HttpVersion11
        if chunked:
            head += b"Transfer-Encoding: chunked\r\n"
        elif unbounded:
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
        common = self._common.lines(seen, request.id, request.head.client.scheme, request.head.origin)
        if not seen & Seen.DATE:
            head += answers.date()
        if not request.keep:
            head += b"Connection: close\r\n"
        elif message.version < HttpVersion11:
            head += b"Connection: keep-alive\r\n"
        caller.write(b"".join((head, common, b"\r\n", b"" if message.method == hdrs.METH_HEAD else body)))
