"""The public side: a connection of a caller, and who answers what comes over it.

aiohttp reads what the public sends: its strict parser, flow control, keep-alive and shutdown are the ones of every
service. Only the loop over a connection's requests is ours, for it is most of what aiohttp costs: what is passed on
goes to its `Proxy` right there, without request or response object; everything else is the application's.

A request without a body that meets an idle connection does not even wake the connection's task: it is begun where it
arrives, and answered where its answer arrives (docs/adr/0039). The task sleeps on meanwhile, on a waiter that is put
aside (`_parked`), and takes over (`hand_over`) when something has to be waited for.
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from aiohttp.http import RawRequestMessage, StreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo
from yarl import URL

from services.gateway import answers, headers
from services.gateway.answers import Common
from services.gateway.headers import Head, climbs
from services.gateway.upstreams import Rule, rule_for, rules_under
from shared.alarm import Alarm
from shared.auth import Principal
from shared.errors import Malformed
from shared.ids import new_text
from shared.listener import Connection as Listened
from shared.listener import Listener
from shared.logs import get_logger

if TYPE_CHECKING:
    from services.gateway.proxy import Proxy, Request

log = get_logger()

_LINGER_SECONDS = 10.0
_REMEMBERED_BYTES = 2048  # of a head; most have less, and there are many connections


class Found(msgspec.Struct, frozen=True, eq=False):
    """Who answers a request that is passed on. `climbs` says that its path could lead elsewhere."""

    proxy: "Proxy"
    rule: Rule
    route: str
    climbs: bool


class Door:
    """Finds the service for a path: everything at and under the prefixes of a proxy is its."""

    def __init__(self, proxies: Sequence["Proxy"], common: Common) -> None:
        self.common = common
        self._by_prefix = {prefix: (proxy, rules_under(prefix)) for proxy in proxies for prefix in proxy.prefixes}
        self._prefix = re.compile("({})(?=/|$)".format("|".join(map(re.escape, self._by_prefix))))
        self._find: Callable[[str, str], Found | None] = lru_cache(maxsize=1024)(self._found)

    def led_to(self, message: RawRequestMessage) -> tuple[str, Found | None]:
        """What is asked for, as it was sent (path and query), and who passes it on."""
        target = message.path
        if target[:1] != "/" and message.url.absolute:  # as sent to proxies
            target = str(message.url.relative())
        if "#" in target:
            target = target.partition("#")[0]
        return target, self._find(message.method, target.partition("?")[0] if "?" in target else target)

    def _found(self, method: str, path: str) -> Found | None:
        """`path` as sent, without its query."""
        # Decoded as routers do, so that `/api/v1/sess%69ons` is limited like what it stands for.
        safe = URL.build(path=path, encoded=True).path_safe
        match = self._prefix.match(safe)
        if match is None:
            return None
        proxy, rules = self._by_prefix[match[1]]
        route = match[1] if safe == match[1] else match[1] + "/..."
        return Found(proxy, rule_for(rules, method, safe), route, climbs(path))

    def connection(self) -> Callable[..., "Connection"]:
        """What makes the connections of a server with this door."""
        return partial(Connection, self)


class Connection(Listened):
    """A caller's connection."""

    __slots__ = ("_door", "_head", "_keep", "_parked", "_passing", "_proven", "_request", "address", "alarm", "scheme")

    address: str
    scheme: str
    alarm: Alarm

    def __init__(self, door: Door, listener: Listener, server: web.Server, **options: Any) -> None:
        super().__init__(listener, server, **options)
        self._door = door
        self._passing: StreamReader | None = None
        self._proven: tuple[str, Principal] | None = None
        self._head: Head | None = None
        self._request: Request | None = None  # that was begun without the task
        self._parked: asyncio.Future[None] | None = None  # for which the task waits meanwhile
        self._keep = True

    def head(self, message: RawRequestMessage, trusted_proxies: int, seconds: float) -> Head:
        """What its headers say; `seconds` is the longest that it may take."""
        head = self._head
        if head is None or head.raw != message.raw_headers:
            head = headers.read(
                message.headers, message.raw_headers, self.address, self.scheme, trusted_proxies, seconds
            )
            size = sum(map(len, chain.from_iterable(head.raw)))  # most of it may be what does not pass
            self._head = head if size <= _REMEMBERED_BYTES else None
        return head

    def principal(self, authorization: str | None) -> Principal | None:
        """Who this connection has been found to be by the same header before: most say the same again and again."""
        if self._proven is None or self._proven[0] != authorization or self._proven[1].expires_at <= time.time():
            return None
        return self._proven[1]

    def proven(self, authorization: str, principal: Principal) -> None:
        self._proven = authorization, principal

    @property
    def body(self) -> StreamReader | None:
        return self._passing or super().body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = self.peername
        self.address = str(peer[0]) if isinstance(peer, tuple) else str(peer or "")
        self.scheme = "https" if self.ssl_context else "http"

    def write(self, data: bytes) -> None:
        """Raises `ConnectionError` when the caller is gone."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the caller is gone")
        transport.write(data)

    async def drained(self) -> None:
        """Wait until the caller has taken enough of what was written."""
        if self._paused:
            await self._drain_helper()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def begins(self, payload: StreamReader) -> None:
        """What it has sent is being passed on."""
        self._request_in_progress, self._passing = True, payload

    def ends(self) -> None:
        """It is answered, or never will be."""
        self.alarm.off()
        self._request_in_progress, self._passing = False, None
        if self._handler_waiter is not None:
            self._handler_waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        waiter, parser = self._waiter, self._parser
        if waiter is None or waiter.done() or parser is None or self._upgraded or self._close or self._force_close:
            super().data_received(data)  # until what is under way is answered, it only queues
            return
        # What aiohttp does, but that the task is woken only for what needs one.
        try:
            messages, self._upgraded, self._message_tail = parser.feed_data(data)
        except HttpProcessingError as error:
            messages = [(_ErrInfo(status=400, exc=error, message=error.message), EMPTY_PAYLOAD)]
        self._received += len(data)
        self._partial = not messages
        if not messages:
            return
        self._request_count += len(messages)
        message, payload = messages[0]
        if len(messages) == 1 and self._began(message, payload, waiter):
            parser.message_consumed()
            return
        self._messages.extend(messages)
        if len(messages) >= self._max_msg_queue_size:
            self._pause_reading_for_buffer()
        waiter.set_result(None)

    def _began(
        self, message: RawRequestMessage | _ErrInfo, payload: StreamReader, waiter: "asyncio.Future[None]"
    ) -> bool:
        """Whether what has arrived is being passed on."""
        if payload is not EMPTY_PAYLOAD or isinstance(message, _ErrInfo):
            return False
        target, found = self._door.led_to(message)
        if found is None:
            return False
        self._parked, self._waiter = waiter, None
        self.begins(payload)
        self._request = request = found.proxy.request(self, message, target, found)
        found.proxy.begin(request)
        return True

    def passed(self, *, keep: bool) -> None:
        """What was begun without the task is answered."""
        waiter, self._waiter, self._parked, self._request = self._parked, self._parked, None, None
        if not keep or self._messages or self._paused or self._close or self._force_close:
            self._keep = keep and not self._close and not self._force_close
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        else:
            self._stay()

    @property
    def woken(self) -> bool:
        """Whether the task has it now, or is about to."""
        return self._parked is None or self._parked.done()

    def hand_over(self) -> None:
        """The task is to go on with it."""
        if self._parked is not None and not self._parked.done():
            self._parked.set_result(None)

    async def start(self) -> None:
        """One request after the other, until either side ends it."""
        task = asyncio.current_task()
        assert task is not None
        self.alarm = Alarm(self._loop, task)
        try:
            while not self._close and not self._force_close:
                if not self._messages:
                    await self._idle()
                if self._request is not None:
                    request, self._request, self._parked = self._request, None, None
                    keep, payload = await request.proxy.rest(request), EMPTY_PAYLOAD
                elif not self._keep:
                    break
                elif not self._messages:  # what was answered without it is more than the caller has taken
                    keep, payload = True, EMPTY_PAYLOAD
                else:
                    message, payload = self._take()
                    if isinstance(message, _ErrInfo):
                        self._refuse(message)
                        break
                    target, found = self._door.led_to(message)
                    if found is None:
                        keep = await self._by_application(message, payload)
                    else:
                        keep = await found.proxy.answer(self, message, payload, target, found)
                if not payload.is_eof() and not await self._lingered(payload):
                    break
                if not keep or self._close or self._force_close:
                    break
                await self.drained()  # who takes no answers is not to be given more and more of them
                self._stay()
        except asyncio.CancelledError:
            self.force_close()
            raise
        except ConnectionError:
            pass  # the caller went away
        except BaseException:
            self.force_close()
            raise
        finally:
            self.alarm.close()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _idle(self) -> None:
        """Until there is something for the task to do."""
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        except asyncio.CancelledError:
            if self._request is None:
                raise
            self._request.cancelled = True
        finally:
            self._waiter = None

    def _take(self) -> tuple[RawRequestMessage | _ErrInfo, StreamReader]:
        """The first that waits; the parser may go on with what is behind it."""
        first = self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return first

    def _refuse(self, unreadable: _ErrInfo) -> None:
        """What the parser could not read. Nothing that follows it is read, either."""
        request_id = new_text()
        log.info("request_unreadable", reason=type(unreadable.exc).__name__, request_id=request_id)
        head, body = answers.problem(Malformed())  # it would quote what was sent
        common = self._door.common.lines(0, request_id, self.scheme, None)
        self.write(head + common + b"Connection: close\r\n\r\n" + body)

    async def _by_application(self, message: RawRequestMessage, payload: StreamReader) -> bool:
        assert self._request_factory is not None
        assert self._request_handler is not None
        assert self._task_handler is not None
        request = self._request_factory(message, payload, self, StreamWriter(self, self._loop), self._task_handler)
        # A task of its own, so that what it binds in its context ends with it.
        response, gone = await self._loop.create_task(self._handle_request(request, None, self._request_handler))
        request._task = None  # type: ignore[assignment] # it would keep itself alive
        payload.set_exception(web.PayloadAccessError())
        return bool(response.keep_alive) and not gone

    async def _lingered(self, payload: StreamReader) -> bool:
        """Read and forget what the caller still sends, for it might not read the answer before it has sent all; whether
        that has an end in time."""
        if self._force_close:
            return False
        self.alarm.set(_LINGER_SECONDS)
        try:
            # Who sent the body on was cancelled just now, and still waits at it until it has had its turn.
            await asyncio.sleep(0)
            while not payload.is_eof():
                await payload.readany()
        except asyncio.CancelledError:
            if not self.alarm.rang():
                raise
            return False
        except Exception:  # noqa: BLE001 - what it sends is no longer of interest
            return False
        finally:
            self.alarm.off()
        return True

    def _stay(self) -> None:
        close_at = self._loop.time() + self._keepalive_timeout
        self._next_keepalive_close_time = close_at
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_at, self._process_keepalive)
