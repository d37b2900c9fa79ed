"""Callers that leave something undone, over real sockets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from shared import metrics
from shared.application import Access, Call, Reply, Route, build
from shared.listener import CUT, Listener, listening
from shared.settings import ProcessSettings
from shared.testing import eventually

SHORT = 0.3


class Handlers:
    def __init__(self) -> None:
        self.received = 0

    async def get(self, call: Call) -> Reply[dict[str, str]]:
        return Reply({"hello": "world"})

    async def take(self, call: Call) -> web.Response:
        async for chunk in call.request.content.iter_any():
            self.received += len(chunk)
        return web.Response(text=str(self.received))

    async def wait(self, call: Call) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def flood(self, call: Call) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(call.request)
        while True:
            await response.write(bytes(65536))


Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Served:
    """A listener, and callers of it that are closed with it."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self, sent: bytes = b"") -> Pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.listener.port)
        self._writers.append(writer)
        writer.write(sent)
        return reader, writer

    async def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def served(**settings: float) -> AsyncIterator[Served]:
    h = Handlers()
    own = ProcessSettings(shutdown_seconds=1, **settings)  # type: ignore[arg-type]
    routes = [
        Route("GET", "/", h.get, Access.PUBLIC),
        Route("POST", "/", h.take, Access.PUBLIC, streaming=True),
        Route("GET", "/wait", h.wait, Access.PUBLIC, streaming=True),
        Route("GET", "/flood", h.flood, Access.PUBLIC, streaming=True),
    ]
    async with listening(build("test", routes, None, own), own, 0) as listener:
        callers = Served(listener)
        try:
            yield callers
        finally:
            await callers.close()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What came until the connection was closed or reset."""
    received = b""
    async with asyncio.timeout(10):
        try:
            while data := await reader.read(65536):
                received += data
        except ConnectionResetError:
            pass
    return received


async def get(pair: Pair) -> bytes:
    """The head of the answer to a GET, its body read."""
    reader, writer = pair
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(b'{"hello":"world"}'))
    return head


def cuts(what: str) -> float:
    count: float = metrics.child(CUT, "test", what)._value.get()
    return count


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "])
async def test_a_head_that_does_not_end_is_cut(begun: bytes) -> None:
    before = cuts("head")
    async with served(head_seconds=SHORT) as door:
        reader, _ = await door.connect(begun)
        assert await ended(reader) == b""
        assert cuts("head") == before + 1


async def test_a_head_that_drips_is_cut_and_an_idle_connection_is_not() -> None:
    async with served(head_seconds=SHORT) as door:
        idle, drips = await door.connect(), await door.connect()
        await get(idle)
        await get(drips)

        async def dripped() -> bool:
            drips[1].write(b"G" if not drips[1].transport.is_closing() else b"")
            return drips[0].at_eof() or drips[0].exception() is not None

        await eventually(dripped, every=SHORT / 10)
        await get(idle)  # it has been idle at least as long as the other one dripped


async def test_requests_under_way_do_not_hide_others_from_the_watch() -> None:
    """A request without a body has no stream that could be waited for."""
    async with served(head_seconds=SHORT) as door:
        waiting, _ = await door.connect(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        reader, _ = await door.connect(b"G")
        assert await ended(reader) == b""
        assert not waiting.at_eof()


async def test_a_body_that_stalls_is_cut_and_one_that_moves_is_not() -> None:
    async with served(stall_seconds=SHORT) as door:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        stalled, moving = await door.connect(head + bytes(10)), await door.connect(head)
        for _ in range(10):
            moving[1].write(bytes(10_000))
            await asyncio.sleep(SHORT / 4)  # in all longer than a stall may be
        assert (await moving[0].readline()).startswith(b"HTTP/1.1 200 ")
        assert await ended(stalled[0]) == b""


async def test_a_body_slower_than_the_slowest_is_cut() -> None:
    async with served(stall_seconds=SHORT) as door:
        reader, writer = await door.connect(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")

        async def cut() -> bool:
            writer.write(b"x" if not writer.transport.is_closing() else b"")
            return reader.at_eof() or reader.exception() is not None

        await eventually(cut, every=SHORT / 10)


async def test_an_answer_that_is_not_taken_is_cut() -> None:
    before = cuts("answer")
    async with served(stall_seconds=SHORT) as door:
        _, writer = await door.connect(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]

        async def cut() -> bool:
            return cuts("answer") == before + 1

        await eventually(cut)


async def test_the_oldest_idle_connection_makes_room() -> None:
    async with served(max_connections=3) as door:
        pairs = [await door.connect() for _ in range(3)]
        for pair in pairs:
            await get(pair)
        another = await door.connect()
        await get(another)
        assert await ended(pairs[0][0]) == b""
        for pair in (*pairs[1:], another):
            await get(pair)


async def test_nobody_busy_makes_room() -> None:
    async with served(max_connections=1) as door:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        busy = await door.connect(head)
        await busy[0].readuntil(b"100 Continue\r\n\r\n")
        assert await ended((await door.connect())[0]) == b""
        busy[1].write(b"ab")
        assert (await busy[0].readline()).startswith(b"HTTP/1.1 200")


async def test_draining_each_answer_is_the_last_of_its_connection() -> None:
    async with served() as door:
        kept = await door.connect()
        assert b"Connection: close" not in await get(kept)
        door.listener.drain()
        assert b"Connection: close" in await get(kept)
        assert await ended(kept[0]) == b""
        new = await door.connect()
        assert b"Connection: close" in await get(new)
        assert await ended(new[0]) == b""


async def test_what_is_no_request_is_answered_as_a_problem() -> None:
    async with served() as door:
        reader, _ = await door.connect(b"GET / HTTP/1.1\r\nHost : x\r\n\r\n")
        head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        assert b"application/problem+json" in head
        assert json.loads(body)["type"] == "urn:tenfold:error:malformed"


async def test_head_is_answered_like_get_without_a_body() -> None:
    async with served() as door:
        reader, writer = await door.connect(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"Content-Length: 17\r\n" in head
        assert (await get((reader, writer))).startswith(b"HTTP/1.1 200 ")  # no body stands before the next head
        writer.write(b"HEAD /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 405 ")
