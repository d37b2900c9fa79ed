"""Kept HTTP/1.1 connections to one instance of a service.

Only what a proxy needs, for aiohttp's client costs more than all the rest of passing a request on: it streams both ways
as fast as the slower side goes, changes nothing, and decodes nothing. `httptools` (llhttp, strict) reads the answers
but for those that are here whole and plain (docs/adr/0042).
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterable, Callable, MutableSequence
from contextvars import Context
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from services.gateway.headers import ODD, Verdicts, to_caller

_CONNECT_SECONDS = 1.0
_KEEPALIVE_SECONDS = 20.0  # shorter than our servers', so no request meets a closing connection
_MAX_HEAD = 32 * 1024
_MAX_PLAIN = 32 * 1024  # beyond, another copy costs more than the parser does
_MAX_BUFFERED = 128 * 1024
_NO_BODY = frozenset({204, 304})
_NOWHERE: deque[bytes] = deque(maxlen=0)  # for trailers
_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2}) [\t -~\x80-\xff]*")


def _status(line: bytes) -> int:
    """What a first line says; zero where it is for the parser to read, or announces an answer without a body."""
    found = _STATUS_LINE.fullmatch(line)
    return 0 if found is None or int(found[1]) in _NO_BODY else int(found[1])


_STATUS = Verdicts(_status)


class UpstreamError(Exception):
    """The instance did not answer whole."""


class Unreachable(UpstreamError):
    """No connection was to be had, so nothing was sent."""


class Answer(msgspec.Struct, eq=False):
    """The head of an answer, and its body as it arrives. Close it, whether or not it was read to its end."""

    _connection: "_Connection"
    repeatable: bool  # it may be the connection's fault when nothing is answered
    bodyless: bool
    tell: Callable[[], None] | None = None  # called once, when head or failure is there; it must not raise
    status: int = 0
    first: bytes = b""  # its line
    lines: list[bytes] = []  # `name: value`
    back: list[bytes] = []  # those that go back to the caller
    seen: int = 0  # among them (`headers.Seen`)
    closes: bool = False  # the connection, after this one
    _chunks: list[bytes] = []
    _buffered: int = 0
    _whole: bool = False
    _error: Exception | None = None
    _arrived: asyncio.Future[None] | None = None
    _closed: bool = False

    async def head(self) -> None:
        """Wait for it. Raises `UpstreamError` when it does not come."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._news()

    def get(self, name: bytes) -> bytes | None:
        """The first header of that name, given in lower case."""
        start = name + b": "
        return next((line[len(start) :] for line in self.lines if line[: len(start)].lower() == start), None)

    async def chunk(self) -> bytes:
        """What has arrived; nothing at the end. Raises `UpstreamError` when the end does not come."""
        while not self._chunks:
            if self._whole:
                return b""
            if self._error is not None:
                raise self._error
            await self._news()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._buffered > _MAX_BUFFERED:
            self._connection.transport.resume_reading()
        self._buffered = 0
        return data

    def ready(self) -> bytes | None:
        """The whole rest of the body if it is here already."""
        if not self._whole:
            return None
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def ends_with_connection(self) -> bool:
        """Whether only the end of the connection says where the body ends."""
        coding = self.get(b"transfer-encoding")
        return not coding.lower().endswith(b"chunked") if coding else self.get(b"content-length") is None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._connection.ended(self._whole and self._buffered <= _MAX_BUFFERED)  # else it is still paused

    def _news(self) -> "asyncio.Future[None]":
        self._arrived = arrived = self._connection.loop.create_future()
        return arrived

    def _wake(self) -> None:
        """Something has arrived, or never will."""
        if self._arrived is not None:
            arrived, self._arrived = self._arrived, None
            if not arrived.done():
                arrived.set_result(None)
        elif self.tell is not None and (self.status or self._error is not None):
            tell, self.tell = self.tell, None
            tell()

    def _begin(self, status: int) -> None:
        self.status = status
        self.bodyless = self.bodyless or status in _NO_BODY

    def _add(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered > _MAX_BUFFERED:
            self._connection.transport.pause_reading()

    def _end(self, error: Exception | None) -> None:
        """The first end counts."""
        if not self._whole and self._error is None:
            self._whole, self._error = error is None, error


class _Connection(asyncio.Protocol):
    """One exchange after the other. The parser calls the methods that begin with `on_`."""

    def __init__(self, pool: "Pool", loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.idle_since = 0.0
        self.used = False
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self.transport: Any = None
        self._answer: Answer | None = None
        self._sending: asyncio.Task[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self.head_bytes = 0
        self._lines: MutableSequence[bytes] = _NOWHERE
        self._keep = False

    def exchange(self, method: str, head: bytes, body: AsyncIterable[bytes] | None, chunked: bool) -> Answer:
        answer = self._answer = Answer(self, self.used, method == "HEAD")
        self.head_bytes, self._keep, self._lines = 0, False, answer.lines
        self.transport.write(head)
        if body is not None:
            self._sending = self.loop.create_task(self._send(answer, body, chunked))
        return answer

    def ended(self, whole: bool) -> None:
        """The caller is done with the exchange: the connection is kept only if both sides said all of it."""
        if self._sending is not None:
            whole = whole and self._sending.done()
            self._sending.cancel()
        answer, self._answer, self._sending = self._answer, None, None
        if answer is not None and answer.bodyless:
            self._parser = httptools.HttpResponseParser(self)  # the old one may still wait for the body of a HEAD
        self.used = True
        self._pool.returned(self, whole and self._keep and not self.transport.is_closing())

    def close(self) -> None:
        self.transport.abort()

    async def _send(self, answer: Answer, body: AsyncIterable[bytes], chunked: bool) -> None:
        try:
            async for data in body:
                if not data:
                    continue
                # Not `writelines`: on the loop of some Pythons 3.12 and 3.13 it pauses nobody (CVE-2024-12254).
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                if self._writable is not None:
                    await self._writable
                if self.transport.is_closing():
                    return
            if chunked:
                self.transport.write(b"0\r\n\r\n")
        except Exception as error:  # noqa: BLE001 - the caller's body broke off, and that is what it must hear
            answer._end(error)
            answer._wake()
            self.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        waiting, self._writable = self._writable, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.close()  # nobody asked
            return
        first = not self.head_bytes
        if not answer.status:
            self.head_bytes += len(data)
        if not (first and len(data) <= _MAX_PLAIN and not answer.bodyless and self._plain(answer, data)):
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                self._fail(f"what it answers is no HTTP: {error!r}")
            if not answer.status and self.head_bytes > _MAX_HEAD:
                self._fail("its head is too long")
        answer._wake()

    def _plain(self, answer: Answer, data: bytes) -> bool:
        """Take an answer that is here from its first to its last byte and says nothing that could be read in two ways,
        as most do. (A parser calls us for every line.) What is not taken is the parser's from its first byte."""
        head, end, body = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        first = lines.pop(0)
        status = _STATUS[first]
        if not end or not status or b"Content-Length: %d" % len(body) not in lines:
            return False
        back, seen = to_caller(lines)
        if seen & ODD:
            return False
        answer.status, answer.first, answer.lines, answer.back, answer.seen = status, first, lines, back, seen
        answer._chunks.append(body)
        answer._whole = self._keep = True
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.resume_writing()
        self._pool.lost(self)
        if self._answer is not None:
            answer = self._answer
            whole = error is None and bool(answer.status) and not answer.bodyless and answer.ends_with_connection()
            answer._end(None if whole else UpstreamError("it closed the connection"))
            answer._wake()

    def _fail(self, reason: str) -> None:
        if self._answer is not None:
            self._answer._end(UpstreamError(reason))
        self.close()

    # httptools

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer._whole:
            self._keep = False  # more than it should have sent

    def on_status(self, reason: bytes) -> None:
        if self._answer is not None and not self._answer.status:  # what follows is not its
            self._answer.first = reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines.append(name + b": " + value)

    def on_headers_complete(self) -> None:
        answer, status = self._answer, self._parser.get_status_code()
        if answer is None or answer._whole:
            self.close()
        elif status < 200:
            answer.first = b""
            answer.lines.clear()
        else:
            if status == 204:  # it has no length, whatever it says
                answer.lines = [line for line in answer.lines if not line.lower().startswith(b"content-length:")]
            self._lines = _NOWHERE
            answer.first = b"HTTP/1.1 %d %b" % (status, answer.first)
            answer.back, answer.seen = to_caller(answer.lines)
            self._keep = self._parser.should_keep_alive()
            answer.closes = not self._keep
            answer._begin(status)
            if answer.bodyless:
                self.on_message_complete()

    def on_body(self, data: bytes) -> None:
        if self._answer is None or self._answer._whole:
            self._keep = False  # more than it should have sent
        else:
            self._answer._add(data)

    def on_message_complete(self) -> None:
        if self._answer is not None and self._answer.status:
            self._answer._end(None)


class Pool:
    """At most `connections` to `url` at a time; who comes later waits as long as a connection may take."""

    def __init__(self, url: str, connections: int, idle: int = 100) -> None:
        self.url = url
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._host_line = f"Host: {parts.netloc}\r\n".encode()
        self._path = parts.path.rstrip("/")
        self._most = connections
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle: deque[_Connection] = deque()
        self._most_idle = idle
        self._open: set[_Connection] = set()
        self.in_flight = 0

    async def ask(
        self,
        method: str,
        target: str,
        headers: bytes,
        body: AsyncIterable[bytes] | None = None,
        *,
        chunked: bool = False,
        repeatable: bool,
        begun: Answer | None = None,
    ) -> Answer:
        """The head of the answer. Raises `UpstreamError`, or what `body` raises; cancelled, it closes the connection.

        `headers` are whole lines, checked; where there is a `body` they have its length, unless it goes out `chunked`.
        A kept connection may have been closed a moment ago: what is `repeatable` then goes out once more on a new one,
        if nothing was answered. `begun` is what `begin` made of the same request.
        """
        head = self._head(method, target, headers, chunked=chunked)
        while True:
            answer, begun = begun, None
            if answer is None:
                if self.in_flight < self._most:
                    self.in_flight += 1
                else:
                    await self._turn()
                connection = self._kept() or await self._connect()
                answer = connection.exchange(method, head, body, chunked)
            try:
                await answer.head()
            except UpstreamError:
                nothing = not answer._connection.head_bytes
                answer.close()
                if not (repeatable and answer.repeatable and nothing):
                    raise
                self._drop_idle()
            except BaseException:
                answer.close()
                raise
            else:
                return answer

    def begin(self, method: str, target: str, headers: bytes) -> Answer | None:
        """Ask by a kept connection, without a body; `None` when none is free. What comes of it is for `ask` to await,
        unless the answer tells before that it is whole."""
        head = self._head(method, target, headers, chunked=False)
        if self.in_flight >= self._most or (connection := self._kept()) is None:
            return None
        self.in_flight += 1
        return connection.exchange(method, head, None, False)

    def _head(self, method: str, target: str, headers: bytes, *, chunked: bool) -> bytes:
        framing = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"
        return b"".join((_first_line(method, self._path, target), self._host_line, headers, framing))

    def retire(self) -> None:
        """Keep no connection beyond what is under way on it."""
        self._most_idle = 0
        self._drop_idle()

    def close(self) -> None:
        """Cut what is under way, too."""
        for connection in self._open:
            connection.close()

    def returned(self, connection: _Connection, whole: bool) -> None:
        if whole and len(self._idle) < self._most_idle:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
        if self._waiting:
            self._release()
        else:
            self.in_flight -= 1

    def lost(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def _turn(self) -> None:
        """Wait for somebody's right to a connection. It is handed over, so nobody who comes later gets it."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._release()  # it had just become ours
            if isinstance(error, TimeoutError):
                raise Unreachable("all connections are in use") from None
            raise

    def _release(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1

    def _kept(self) -> _Connection | None:
        oldest = time.monotonic() - _KEEPALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()  # the one that was used last
            if connection.idle_since < oldest:
                connection.close()
            elif not connection.transport.is_closing():
                return connection
        return None

    async def _connect(self) -> _Connection:
        """A new connection, for who has the right to one."""
        loop = asyncio.get_running_loop()
        # In nobody's context: what arrives later is not of the trace of who was the first to need the connection.
        connecting = loop.create_task(
            loop.create_connection(lambda: _Connection(self, loop), self._host, self._port, ssl=self._tls or None),
            context=Context(),
        )
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await connecting
        except BaseException as error:
            if connecting.done() and not connecting.cancelled() and connecting.exception() is None:
                connecting.result()[1].close()  # made in the very moment in which we were cancelled
            self._release()
            if isinstance(error, OSError):  # TimeoutError is one
                raise Unreachable(repr(error)) from error
            raise
        self._open.add(connection)
        return connection

    def _drop_idle(self) -> None:
        """One was closed by the instance: the others have most likely been so too."""
        while self._idle:
            self._idle.pop().close()


@lru_cache(maxsize=1024)
def _first_line(method: str, base: str, target: str) -> bytes:
    if "\r" in target or "\n" in target:
        raise ValueError("a line break in what is asked for")
    return f"{method} {base}{target} HTTP/1.1\r\n".encode("utf-8", "surrogateescape")
