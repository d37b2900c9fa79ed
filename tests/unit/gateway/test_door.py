"""What an idle connection does with what arrives, without a service behind it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.http import RawRequestMessage

from services.gateway.answers import Common
from services.gateway.cors import Cors
from services.gateway.door import Connection, Door, Found
from shared.listener import Listener
from shared.settings import ProcessSettings
from shared.testing import eventually

ASKS = b"GET /api/1 HTTP/1.1\r\nHost: x\r\n\r\n"


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.calls: list[str] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.calls.append("resume")

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


class Proxy:
    """Holds what it is to pass on until told to answer."""

    prefixes = ("/api",)

    def __init__(self) -> None:
        self.begun: list[tuple[Connection, str]] = []
        self.answered: list[str] = []

    def request(self, caller: Connection, message: RawRequestMessage, target: str, found: Found) -> Any:
        return caller, target

    def begin(self, request: tuple[Connection, str]) -> None:
        self.begun.append(request)

    async def answer(self, caller: Connection, message: Any, payload: Any, target: str, found: Found) -> bool:
        self.answered.append(target)
        caller.begins(payload)
        caller.ends()
        return True

    def finish(self) -> None:
        caller, target = self.begun.pop()
        self.answered.append(target)
        caller.ends()
        caller.passed(keep=True)


@asynccontextmanager
async def opened(proxy: Proxy) -> AsyncIterator[tuple[Connection, Transport]]:
    """A connection whose task waits for a request."""
    door = Door([proxy], Common(Cors(())))  # type: ignore[list-item]
    server = web.Server(_unanswered, loop=asyncio.get_running_loop())
    listener = Listener(server, "gateway", ProcessSettings(), door.connection())
    connection, transport = listener.protocol(), Transport()
    assert isinstance(connection, Connection)
    connection.connection_made(transport)
    task = connection._task_handler
    assert task is not None
    await asyncio.sleep(0)
    try:
        yield connection, transport
    finally:
        connection.connection_lost(None)
        task.cancel()
        await asyncio.wait([task])


async def _unanswered(_request: web.BaseRequest) -> web.StreamResponse:
    raise NotImplementedError


async def test_a_request_is_begun_where_it_arrives() -> None:
    proxy = Proxy()
    async with opened(proxy) as (caller, _):
        for _round in range(40):  # more than it may queue
            caller.data_received(ASKS[:10])
            assert caller.waits_for_a_request
            caller.data_received(ASKS[10:])
            assert proxy.begun == [(caller, "/api/1")]
            proxy.finish()
        caller.data_received(ASKS * 2)  # there is room for them, for the others have gone
        assert len(caller._messages) == 2


async def test_an_idle_connection_is_read_no_further_than_it_may_queue() -> None:
    proxy = Proxy()
    async with opened(proxy) as (caller, transport):
        caller.data_received(ASKS * 100)
        assert transport.calls == ["pause"]

        async def answered() -> bool:
            return len(proxy.answered) == 100

        await eventually(answered)
        assert transport.calls[-1] == "resume"
        assert len(caller._messages) == 0


@pytest.mark.parametrize("before", [b"", ASKS])
async def test_what_cannot_be_read_is_refused_after_what_can(before: bytes) -> None:
    proxy = Proxy()
    async with opened(proxy) as (caller, transport):
        caller.data_received(before + b"GET / HTTP/1.1\r\nHost : x\r\n\r\n" + ASKS)

        async def closed() -> bool:
            return transport.closed

        await eventually(closed)
        assert transport.written.startswith(b"HTTP/1.1 400 ")
        assert proxy.begun == []


async def test_what_is_half_a_head_is_known_to_be_one() -> None:
    """So that its time is bounded."""
    proxy = Proxy()
    async with opened(proxy) as (caller, _):
        known = []
        for piece in (b"", ASKS[:10], ASKS[10:]):
            caller.data_received(piece)
            known.append((caller._partial, caller._received))
        assert known == [(True, 0), (True, 10), (False, len(ASKS))]
        proxy.finish()
