"""Calls to a service whose instances fail in different ways, over real sockets."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from shared import http_client
from shared.errors import DeadlineExceeded, Unavailable
from shared.http_client import ServiceClient, deadline
from shared.listener import listening
from shared.resilience import Fleet
from shared.settings import ProcessSettings
from shared.testing import eventually

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(eq=False)
class Peer:
    url: str
    in_flight: int = 0

    def retire(self) -> None: ...

    def close(self) -> None: ...


class World:
    def __init__(self, opened: AsyncExitStack) -> None:
        self._opened = opened
        self.fleet: Fleet[Peer]

    async def instance(self, handler: Handler) -> str:
        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        listener = await self._opened.enter_async_context(listening(app, ProcessSettings(shutdown_seconds=1), 0))
        return f"http://127.0.0.1:{listener.port}"

    async def client(self, *urls: str) -> ServiceClient:
        self.fleet = await self._opened.enter_async_context(Fleet.opened("things", urls, Peer, 100))
        return ServiceClient(self.fleet, await self._opened.enter_async_context(http_client.session()))


@pytest.fixture
def world(opened: AsyncExitStack) -> World:
    return World(opened)


async def well(_request: web.Request) -> web.Response:
    return web.json_response({"well": True})


async def get(client: ServiceClient, timeout: float = 5) -> Any:
    return await client.get("/", dict[str, bool], headers={}, timeout=timeout)


async def test_one_that_answers_nothing_but_errors_does_not_draw_the_requests_for_being_fast(world: World) -> None:
    calls = 0

    async def broken(_request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        return web.Response(status=500)

    client = await world.client(await world.instance(broken), await world.instance(well))
    for _ in range(50):
        assert await get(client) == {"well": True}
    assert 1 <= calls <= 5


async def test_a_service_that_is_down_is_left_alone_and_found_again(world: World) -> None:
    down, calls = True, 0

    async def sometimes(request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        if down and request.transport is not None:
            request.transport.abort()
        return await well(request)

    client = await world.client(await world.instance(sometimes))
    for _ in range(10):
        with pytest.raises(Unavailable):
            await get(client)
    before = calls
    for _ in range(10):
        with pytest.raises(Unavailable) as refused:
            await get(client)
        assert int(refused.value.headers["Retry-After"]) >= 1
    assert calls == before
    down = False

    async def found_again() -> bool:
        try:
            return bool(await get(client))
        except Unavailable:
            return False

    await eventually(found_again)
    assert not world.fleet.breaker.is_open


async def test_more_than_the_limit_are_refused_and_places_come_back(world: World) -> None:
    go = asyncio.Event()

    async def waits(request: web.Request) -> web.Response:
        await go.wait()
        return await well(request)

    client = await world.client(await world.instance(waits))
    world.fleet.limit.limit = 2.0
    async with asyncio.TaskGroup() as group:
        served = [group.create_task(get(client)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="overloaded"):
            await get(client)
        go.set()
    assert [task.result() for task in served] == [{"well": True}] * 2
    assert world.fleet.limit.in_flight == 0


async def test_the_deadline_ends_a_call_and_goes_along(world: World) -> None:
    told: list[int] = []

    async def hangs(request: web.Request) -> web.Response:
        told.append(int(request.headers["Request-Timeout"]))
        await asyncio.Event().wait()
        raise AssertionError

    client = await world.client(await world.instance(hangs))
    with pytest.raises((DeadlineExceeded, Unavailable)), deadline(0.3):
        await get(client)
    assert 0 < told[0] <= 300
    assert world.fleet.limit.in_flight == 0
