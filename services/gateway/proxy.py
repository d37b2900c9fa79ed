"""Passes requests on to services and their answers back, streaming both ways.

A body is never kept: it is read from one side as fast as the other takes it, so what a request costs does not depend on
its size. From that follows what can be tried again: whatever no connection could be made for, and reads without a body.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import hdrs, web

from services.gateway import headers as hygiene
from services.gateway.errors import AnswerBrokeOff, TooSlow
from services.gateway.instances import Instances
from services.gateway.limits import Limits
from services.gateway.settings import Settings
from services.gateway.upstream_pool import Answer, Headers, Pool, Unreachable, UpstreamError
from services.gateway.upstreams import RouteClass, Upstream, rule_for, rules_under
from shared import consistency, http_client, metrics, middleware, tracing
from shared.application import authenticate
from shared.auth import TokenVerifier
from shared.errors import DeadlineExceeded, Malformed, TooLarge, Unavailable
from shared.logs import get_logger

log = get_logger()

_ATTEMPTS = 3
_COOKIE_SECONDS = 60
_SAFE = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
_CONSISTENCY = consistency.HEADER.lower()

FAILURES = metrics.Counter(
    "tenfold_gateway_upstream_failures_total", "Requests a service did not answer whole", ("upstream", "reason")
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pools:
    """The connections to every instance of every service, closed together."""

    def __init__(self, settings: Settings) -> None:
        self.by_service = {
            name: Instances([Pool(url.rstrip("/"), settings.upstream_max_connections) for url in urls])
            for name, urls in settings.upstream.items()
        }

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> "AsyncIterator[Pools]":
        pools = cls(settings)
        try:
            yield pools
        finally:
            for instances in pools.by_service.values():
                instances.close()


class _Body:
    """The caller's body on its way: counted, and with a clock that any progress starts anew."""

    def __init__(self, request: web.Request, most: int, progress: Callable[[], None]) -> None:
        self._request = request
        self._most = most
        self._progress = progress
        self._sent = 0
        self.begun = False
        self.finished = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        try:
            if self._request.headers.get(hdrs.EXPECT):
                await _invite(self._request)
            async for chunk in self._request.content.iter_any():
                self._sent += len(chunk)
                if self._sent > self._most:
                    raise TooLarge(f"at most {self._most} bytes")
                self._progress()
                yield chunk
                self._progress()
        except (web.PayloadAccessError, aiohttp.ClientError, OSError, ValueError) as error:
            raise Malformed("the body is not whole") from error
        self.finished = True


class Proxy:
    """Requests for one service."""

    def __init__(
        self,
        upstream: Upstream,
        settings: Settings,
        instances: Instances[Pool],
        verifier: TokenVerifier,
        limits: Limits,
    ) -> None:
        self._name = upstream.name
        self._settings = settings
        self._verifier = verifier
        self._limits = limits
        self._instances = instances
        self._retries = http_client.RetryBudget()
        self._event_streams: set[asyncio.Transport] = set()

    def handler(self, prefix: str) -> Handler:
        """Answers everything at and under `prefix`."""
        rules = rules_under(prefix)

        async def handle(request: web.Request) -> web.StreamResponse:
            hygiene.check_head(request)
            target = hygiene.target_of(request)
            rule = rule_for(rules, request.method, request.rel_url.path_safe)
            client = hygiene.client_of(request, self._settings.trusted_proxies)
            principal = await authenticate(request, rule.access, self._verifier)
            limited = await self._limits.hit(rule.route_class, principal, client.address)
            most = self._most(rule.route_class)
            if (request.content_length or 0) > most:
                raise TooLarge(f"at most {most} bytes")
            return await self._pass(request, target, client, most, limited)

        return handle

    async def end_event_streams(self, _app: web.Application) -> None:
        """They would never end by themselves. Who follows one takes it up again at another gateway."""
        for transport in self._event_streams:
            transport.close()

    def _most(self, route_class: RouteClass) -> int:
        return self._settings.upload_max_bytes if route_class is RouteClass.UPLOAD else self._settings.max_body_bytes

    async def _pass(
        self, request: web.Request, target: str, client: hygiene.Client, most: int, extra: dict[str, str]
    ) -> web.StreamResponse:
        seconds = http_client.remaining(self._settings.request_timeout_seconds)
        loop = asyncio.get_running_loop()
        clock = asyncio.timeout(seconds)
        answered = False
        body = None
        if request.can_read_body:
            # While the body moves the service need not answer; what counts is that it moves.
            idle = min(seconds, self._settings.idle_seconds)
            body = _Body(request, most, lambda: None if answered else clock.reschedule(loop.time() + idle))
        outgoing = hygiene.to_service(
            request,
            client,
            {
                middleware.REQUEST_ID: middleware.request_id(request),
                http_client.DEADLINE_HEADER: str(max(1, int(seconds * 1000))),
                **({"traceparent": parent} if (parent := tracing.traceparent()) else {}),
            },
        )
        try:
            async with clock:
                answer = await self._ask(request, target, list(outgoing.items()), body)
            answered = True
        except TimeoutError:
            metrics.child(FAILURES, self._name, "timeout").inc()
            if body is not None and body.begun and not body.finished:
                raise TooSlow from None
            raise DeadlineExceeded(f"{self._name} did not answer in time") from None
        try:
            return await self._answer(request, answer, body, client, extra)
        finally:
            answer.close()

    async def _ask(self, request: web.Request, target: str, outgoing: Headers, body: _Body | None) -> Answer:
        """The head of the service's answer. Raises `Unavailable` when no instance gives one."""
        # Not DELETE and PUT, though idempotent: the second one's answer would be another (404, 412).
        repeatable = request.method in _SAFE and body is None
        order = self._instances.in_order()
        if len(order) == 1 and repeatable:
            order = order * 2
        self._retries.called()
        for attempt, instance in enumerate(order[:_ATTEMPTS]):
            if attempt and not self._retries.granted():
                break
            try:
                answer = await instance.ask(request.method, target, outgoing, body, repeatable=repeatable)
            except Unreachable as error:
                self._instances.failed(instance)
                self._failed("unreachable", error)
            except UpstreamError as error:
                self._instances.failed(instance)
                self._failed("no_answer", error)
                if not repeatable:
                    break
            else:
                self._instances.answered(instance)
                return answer
        raise Unavailable(f"{self._name} does not answer")

    def _failed(self, reason: str, error: Exception) -> None:
        metrics.child(FAILURES, self._name, reason).inc()
        log.warning("upstream_failed", upstream=self._name, reason=reason, error=repr(error))

    async def _answer(
        self,
        request: web.Request,
        answer: Answer,
        body: _Body | None,
        client: hygiene.Client,
        extra: dict[str, str],
    ) -> web.StreamResponse:
        headers = hygiene.to_caller(answer.headers)
        headers.update(extra)
        # An answer that is here already, as most are, goes out in one write with its head.
        rest = answer.ready()
        response: web.StreamResponse = (
            web.Response(status=answer.status, reason=answer.reason, headers=headers, body=rest)
            if rest
            else web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        )
        if (token := answer.get(_CONSISTENCY)) is not None:
            response.set_cookie(
                hygiene.COOKIE,
                token,
                max_age=_COOKIE_SECONDS,
                path="/api",
                httponly=True,
                samesite="Lax",
                secure=client.scheme == "https",
            )
        if body is not None and not body.finished and not request.content.at_eof():
            # An early answer. What the caller still sends must not be taken for its next request.
            response.force_close()
        streams = (answer.get("content-type") or "").startswith("text/event-stream")
        transport = request.transport if streams else None
        if transport is not None:
            self._event_streams.add(transport)
        try:
            await response.prepare(request)
            while not rest:
                async with asyncio.timeout(self._settings.idle_seconds):
                    chunk = await answer.chunk()
                    if not chunk:
                        break
                    await response.write(chunk)
            await response.write_eof()
        except (UpstreamError, TimeoutError) as error:
            self._failed("broke_off", error)
            raise AnswerBrokeOff from error
        finally:
            if transport is not None:
                self._event_streams.discard(transport)
        return response


async def _invite(request: web.Request) -> None:
    """`100 Continue`, sent only once token, rate and size are found good and a service takes the body."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the head of the answer is still to come


async def no_invitation(request: web.Request) -> None:
    """In place of aiohttp's handler of `Expect`, which invites every body before anybody has looked at the request."""
    if request.headers[hdrs.EXPECT].lower() != "100-continue":
        raise web.HTTPExpectationFailed
