"""Redis over one connection, behind short timeouts and a breaker: slow or gone, it costs a request 60 ms once, and then
nothing.

Commands asked for in one turn of the event loop go out in one write, and answers are handed to their callers as they
come back, in order. Redis holds nothing that cannot be had again, so every caller has a way to go on without it.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeAlias, cast

import hiredis
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection, parse_url

from shared import metrics
from shared.logs import get_logger

log = get_logger()

Argument: TypeAlias = str | bytes | int | float

# Together the most that a call can take. The grace is there because timers may run before what has arrived is read.
_CALL_SECONDS = 0.05
_GRACE_SECONDS = 0.01
_PROBE_SECONDS = 1.0
_SHORTEST_AWAY_SECONDS = 0.2
_LONGEST_AWAY_SECONDS = 10.0
_INCOMPLETE = object()

FAILURES = metrics.Counter("tenfold_redis_failures_total", "Calls to Redis that failed or were not tried")
AWAY = metrics.Gauge("tenfold_redis_away", "1 while Redis is not asked")


class RedisAway(Exception):
    """Redis did not answer in time, or refused, or has just not answered and is not asked."""


class NoScript(RedisAway):
    """Redis does not have the script, or has it no more, as after a restart: it is to be sent."""


class Asker(Protocol):
    """Where an answer goes: a future, or what needs no task to go on. Neither method may raise."""

    def done(self) -> bool:
        """Whether nobody waits any more."""
        ...

    def set_result(self, answer: Any, /) -> None: ...

    def set_exception(self, error: RedisAway, /) -> None: ...


# When it was asked, the command's bytes, and where its answer goes.
_Call: TypeAlias = tuple[float, bytes, Asker]


class _Link(asyncio.Protocol):
    """One connection. Knows which calls wait for an answer, and calls `lost` if it closes before it is told to."""

    def __init__(self, lost: "Callable[[_Link, str], None]") -> None:
        self.waiting: deque[_Call] = deque()
        self._lost = lost
        self._transport: asyncio.Transport
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, calls: list[_Call]) -> None:
        self.waiting.extend(calls)
        self._transport.write(b"".join([call[1] for call in calls]))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        take = self._reader.gets
        while (answer := take()) is not _INCOMPLETE:
            if isinstance(answer, hiredis.PushNotification):
                continue
            asker = self.waiting.popleft()[2]
            # A caller that went away leaves only its own answer behind.
            if asker.done():
                continue
            if not isinstance(answer, hiredis.ReplyError):
                asker.set_result(answer)
            elif str(answer).startswith("NOSCRIPT"):
                asker.set_exception(NoScript(str(answer)))
            else:
                FAILURES.inc()
                asker.set_exception(RedisAway(str(answer)))
                if str(answer).startswith("READONLY"):
                    self.abort()  # a primary no more: a new connection may find the one that is

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self, repr(error) if error else "the connection was closed")

    def abort(self) -> None:
        self._transport.abort()


class Redis:
    """Open it with `Redis.opened`."""

    def __init__(self, url: str, call_seconds: float) -> None:
        self._call_seconds = call_seconds
        self._address: dict[str, Any] = dict(parse_url(url))
        self._loop = asyncio.get_running_loop()
        self._link: _Link | None = None
        self._linked_at = 0.0
        self._unsent: list[_Call] = []
        self._task: asyncio.Task[None] | None = None  # that connects or, while Redis is away, looks for it
        self._timer: asyncio.TimerHandle | None = None
        self._away = False
        self._away_seconds = _SHORTEST_AWAY_SECONDS

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str, *, call_seconds: float = _CALL_SECONDS) -> "AsyncIterator[Redis]":
        """Does not connect yet: a process starts without its Redis. A call may take `call_seconds` and 10 ms."""
        opened = cls(url, call_seconds)
        try:
            yield opened
        finally:
            opened._away = True
            opened._give_up("closed")
            if opened._task is not None:
                opened._task.cancel()
                with suppress(asyncio.CancelledError):
                    await opened._task

    async def call(self, *command: Argument) -> Any:
        """The answer to `command`, text as bytes; or raise `RedisAway`, within 60 ms unless opened otherwise.

        A caller that is cancelled leaves the others' answers where they belong.
        """
        answer: asyncio.Future[Any] = self._loop.create_future()
        self.ask(answer, *command)
        return await answer

    def ask(self, asker: Asker, *command: Argument) -> None:
        """The same for who does not wait in a task: `asker` is told the answer or the failure, within the same time."""
        if self._away:
            FAILURES.inc()
            asker.set_exception(RedisAway("not asked"))
            return
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append((self._loop.time(), _packed(command), asker))

    def _send(self) -> None:
        if not self._unsent:
            return  # given up meanwhile
        if self._timer is None:
            self._timer = self._loop.call_later(self._call_seconds, self._watch)
        if self._link is not None:
            calls, self._unsent = self._unsent, []
            self._link.send(calls)
        elif self._task is None:
            self._task = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await self._open_link()
        except (OSError, RedisAway) as error:
            self._task = None
            self._fail(repr(error))
        else:
            self._task = None
            self._send()

    async def _open_link(self) -> None:
        """Connect and greet. Raises `OSError` or `RedisAway`; the caller bounds it in time."""
        address, link = self._address, _Link(self._lost)
        kind = address.get("connection_class")
        if kind is UnixDomainSocketConnection:
            await self._loop.create_unix_connection(lambda: link, address["path"])
        else:
            options = {name: value for name, value in address.items() if name != "connection_class"}
            tls = SSLConnection(**options).ssl_context.get() if kind is SSLConnection else None
            host, port = address.get("host", "localhost"), address.get("port", 6379)
            await self._loop.create_connection(lambda: link, host, port, ssl=tls)
        try:
            greeting: list[Argument] = ["HELLO", 3]
            if "password" in address:
                greeting += ["AUTH", address.get("username") or "default", address["password"]]
            for command in (tuple(greeting), ("SELECT", address.get("db", 0))):
                answer = self._loop.create_future()
                link.send([(self._loop.time(), _packed(command), answer)])
                await answer
        except BaseException:
            link.abort()
            raise
        self._link, self._linked_at = link, self._loop.time()

    def _lost(self, link: _Link, reason: str) -> None:
        if link is self._link and not link.waiting:
            self._link = None  # idle: the next call connects anew
        elif link is self._link:
            self._fail(reason)
        else:
            _refuse(link.waiting, reason)

    def _oldest(self) -> _Call | None:
        if self._link is not None and self._link.waiting:
            return self._link.waiting[0]
        return self._unsent[0] if self._unsent else None

    def _watch(self) -> None:
        """One timer for all calls: looks at the oldest one when that should be answered."""
        self._timer = None
        oldest = self._oldest()
        if oldest is None:
            return
        left = oldest[0] + self._call_seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._watch)
        else:
            self._timer = self._loop.call_later(_GRACE_SECONDS, self._judge, oldest)

    def _judge(self, call: _Call) -> None:
        if call is self._oldest():
            self._fail("no answer in time")
        else:
            self._watch()

    def _fail(self, reason: str) -> None:
        """Refuse the calls under way and ask nothing more until a probe has been answered."""
        lasted = self._link is not None and self._loop.time() - self._linked_at > _LONGEST_AWAY_SECONDS
        self._give_up(reason)
        if self._away:
            return
        self._away = True
        AWAY.set(1)
        if lasted:
            self._away_seconds = _SHORTEST_AWAY_SECONDS
        log.warning("redis_away", error=reason)
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._probe())

    def _give_up(self, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        link, self._link = self._link, None
        unsent, self._unsent = self._unsent, []
        if link is not None:
            _refuse(link.waiting, reason)
            link.abort()
        _refuse(unsent, reason)

    async def _probe(self) -> None:
        """No call pays for finding out whether Redis is back."""
        while True:
            await asyncio.sleep(self._away_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            self._away_seconds = min(self._away_seconds * 2, _LONGEST_AWAY_SECONDS)
            with suppress(Exception):  # whatever it is, there is another try
                async with asyncio.timeout(_PROBE_SECONDS):
                    await self._open_link()
                self._task = None
                self._away = False
                AWAY.set(0)
                log.info("redis_back")
                return


def _packed(command: tuple[Argument, ...]) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub says a tuple of one
    return packed


def _refuse(calls: "deque[_Call] | list[_Call]", reason: str) -> None:
    for _, _, answer in calls:
        if not answer.done():
            FAILURES.inc()
            answer.set_exception(RedisAway(reason))
    calls.clear()
