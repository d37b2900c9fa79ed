"""A port that serves an application: aiohttp's server, with a clock on everything that a caller can leave undone.

aiohttp waits for the end of a head as long as it keeps connections alive, and for bodies and for answers to be taken
without end. Here a sweep a second looks at every connection and cuts it when

- a head is not whole `HEAD_SECONDS` after it was begun, or after the connection was opened,
- a body that the handler waits for is behind `STALL_SECONDS` and 500 bytes a second,
- nothing was taken of an answer for `STALL_SECONDS`.

An idle connection between requests costs a few kilobytes and lives for 75 s; when there are `MAX_CONNECTIONS`, the
oldest idle one makes room for a new one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from shared import metrics
from shared.errors import Malformed, TenfoldError
from shared.logs import get_logger
from shared.middleware import CONTEXT, problem_response
from shared.settings import ProcessSettings

log = get_logger()

_KEEPALIVE_SECONDS = 75.0  # longer than the client's and the balancer's, so that they close first
_SWEEP_SECONDS = 1.0
_SLOWEST_BODY = 500.0  # bytes a second

CONNECTIONS = metrics.Gauge("tenfold_http_connections", "Open connections of callers", ("service",))
CUT = metrics.Counter(
    "tenfold_http_connections_cut_total", "Connections closed on callers, by what they left undone", ("service", "what")
)


class Connection(RequestHandler):
    """One caller's connection. `phase` is what its side has to do, `since` when that was first seen."""

    __slots__ = ("_listener", "_mark", "_partial", "_phase", "_received", "_since")

    def __init__(self, listener: "Listener", server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._listener = listener
        self._received = 0
        self._partial = True  # until the first head is whole
        self._phase: tuple[object, ...] = ()
        self._since = 0.0
        self._mark = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.make_room(self)

    def data_received(self, data: bytes) -> None:
        if self._close and self._request_in_progress and self.transport is not None:
            # A stopping server of aiohttp reads nothing more, not even the rest of a body that is being read.
            forced, self._close, self._force_close = self._force_close, False, False
            super().data_received(data)
            self._close, self._force_close = True, forced
        else:
            super().data_received(data)
        self._received += len(data)
        waiter = self._waiter
        self._partial = waiter is not None and not waiter.done()

    @property
    def draining(self) -> bool:
        """Whether each answer is to be the last of its connection."""
        return self._listener.draining or self._close

    @property
    def body(self) -> StreamReader | None:
        """Of the request that is being answered."""
        return None if self._current_request is None else self._current_request.content

    @property
    def waits_for_a_request(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def overdue(self, now: float, transport: asyncio.Transport, head_seconds: float, stall_seconds: float) -> str:
        """What the caller has left undone for too long; empty when nothing."""
        body, allowed, what = self.body, stall_seconds, ""
        phase: tuple[object, ...] = ()
        if unsent := transport.get_write_buffer_size():
            what, phase = "answer", (unsent,)
        elif self._partial and self.waits_for_a_request:
            what, phase, allowed = "head", ("head", self._request_count), head_seconds
        elif body is not None and not body.is_eof() and body._waiter is not None:  # one that is empty has no waiter
            what, phase = "body", ("body", self._request_count)
        if phase != self._phase:
            self._phase, self._since, self._mark = phase, now, self._received
        if what == "body":
            allowed += (self._received - self._mark) / _SLOWEST_BODY
        return what if what and now - self._since > allowed else ""

    def answer_the_last(self) -> None:
        """The next answer says that it is the last one of this connection."""
        self._request_factory = self._listener.last_request

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # not answered: it quotes what was sent
    ) -> web.StreamResponse:
        """What aiohttp refuses before any handler sees it is answered as a problem like everything else."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if status >= 500:
            log.error("request_failed", exc_info=exc)
        response = problem_response(Malformed() if status < 500 else TenfoldError())
        response.force_close()
        return response


# What makes an application's connections, where it has a kind of its own; it takes what `Connection` takes.
CONNECTION: web.AppKey[Callable[..., Connection]] = web.AppKey("connection")


class Listener:
    """Made by `listening`."""

    def __init__(
        self, server: web.Server, service: str, own: ProcessSettings, connection: Callable[..., Connection]
    ) -> None:
        self._connection = connection
        self.draining = False
        self._server = server
        self._service = service
        self._own = own
        self._make_request = server.request_factory
        self._protocol_options = {
            "loop": asyncio.get_running_loop(),
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": _KEEPALIVE_SECONDS,
        }
        self.port = 0

    def protocol(self) -> Connection:
        return self._connection(self, self._server, **self._protocol_options)

    def drain(self) -> None:
        """From now on an answer ends its connection: callers go elsewhere while we still serve them, and none of them
        meets a connection that closes."""
        self.draining = True
        self._server.request_factory = self.last_request
        for connection in self._server.connections:
            if isinstance(connection, Connection):
                connection.answer_the_last()

    def last_request(self, message: Any, *rest: Any) -> web.BaseRequest:
        return self._make_request(message._replace(should_close=True), *rest)

    def make_room(self, new: Connection) -> None:
        """When there are too many connections, the oldest that is idle goes; the new one when none is."""
        connections = self._server._connections
        if len(connections) <= self._own.max_connections:
            return
        idle = (c for c in connections if isinstance(c, Connection) and c.waits_for_a_request)
        self._cut(next(idle, new), "room")

    async def watch(self) -> None:
        """Sweep until cancelled."""
        own = self._own
        every = min(_SWEEP_SECONDS, own.head_seconds / 4, own.stall_seconds / 4)
        gauge = metrics.child(CONNECTIONS, self._service)
        while True:
            await asyncio.sleep(every)
            gauge.set(len(self._server._connections))
            try:
                self._sweep(asyncio.get_running_loop().time())
            except Exception:
                log.exception("sweep_failed")

    def _sweep(self, now: float) -> None:
        head_seconds, stall_seconds = self._own.head_seconds, self._own.stall_seconds
        for connection, transport in list(self._server._connections.items()):
            if isinstance(connection, Connection) and (
                what := connection.overdue(now, transport, head_seconds, stall_seconds)
            ):
                self._cut(connection, what)

    def _cut(self, connection: Connection, what: str) -> None:
        metrics.child(CUT, self._service, what).inc()
        self._server._connections[connection].abort()


@asynccontextmanager
async def listening(
    application: web.Application, own: ProcessSettings, port: int, *, reuse_port: bool = False
) -> AsyncIterator[Listener]:
    """Serve while open; then stop accepting and give requests in flight `SHUTDOWN_SECONDS` to finish."""
    runner = web.AppRunner(
        application,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,
        shutdown_timeout=own.shutdown_seconds,
    )
    await runner.setup()
    assert runner.server is not None
    context = application.get(CONTEXT)
    connection = application.get(CONNECTION, Connection)
    listener = Listener(runner.server, context.service if context else "admin", own, connection)
    loop = asyncio.get_running_loop()
    watching = loop.create_task(listener.watch(), name="watch-connections")
    try:
        server = await loop.create_server(
            listener.protocol, own.host, port, reuse_port=reuse_port or None, backlog=1024
        )
        listener.port = server.sockets[0].getsockname()[1]
        try:
            yield listener
        finally:
            server.close()
    finally:
        watching.cancel()
        await runner.cleanup()
