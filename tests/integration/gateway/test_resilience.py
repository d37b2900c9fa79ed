"""Services that fail, hang, stop or have too much to do, behind a real gateway."""

import asyncio
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from shared.listener import listening
from shared.settings import ProcessSettings
from shared.testing import eventually
from tests.integration.gateway.conftest import Keys, World

PATH = "/api/v1/users/01a21311-b5a5-726d-b20a-ab0db8c16c9f"


async def well(_request: web.Request) -> web.Response:
    return web.json_response({})


async def test_a_service_that_breaks_off_is_left_alone_and_found_again(
    world: World, http: aiohttp.ClientSession
) -> None:
    down, calls = True, 0

    async def sometimes(request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        if down and request.transport is not None:
            request.transport.abort()
        return web.json_response({})

    broken = await world.service(sometimes)
    door = await world.gateway(await world.service(well), upstream={"users": (broken,)})
    for _ in range(10):
        assert (await http.get(door + PATH)).status == 503
    before = calls
    refused = await http.get(door + PATH)
    assert (refused.status, refused.content_type) == (503, "application/problem+json")
    assert int(refused.headers["Retry-After"]) >= 1
    assert calls == before
    assert (await http.get(f"{door}/api/v1/unsubscribe/x")).status == 200  # other services have nothing to do with it
    down = False

    async def found_again() -> bool:
        return (await http.get(door + PATH)).status == 200

    await eventually(found_again)


async def test_a_service_that_hangs_is_left_alone(world: World, http: aiohttp.ClientSession) -> None:
    calls = 0

    async def hangs(_request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        await asyncio.Event().wait()
        raise AssertionError

    door = await world.in_front_of(hangs, request_timeout_seconds=0.3)
    answers = await asyncio.gather(*(http.get(door + PATH) for _ in range(10)))
    assert {answer.status for answer in answers} == {504}
    assert (await http.get(door + PATH)).status == 503
    assert calls == 10


async def test_callers_cannot_have_a_service_left_alone(world: World, http: aiohttp.ClientSession) -> None:
    """Neither by not waiting for it, nor by bodies that it breaks off for."""

    async def impatient(request: web.Request) -> web.Response:
        if "wait" in request.query:
            await asyncio.sleep(0.1)
        if request.method == "POST" and request.transport is not None:
            request.transport.abort()
        return web.json_response({})

    door = await world.in_front_of(impatient)
    for _ in range(15):
        assert (await http.get(f"{door}{PATH}?wait", headers={"Request-Timeout": "20"})).status == 504
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(door).port)
        writer.write(b"POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        writer.close()
        await writer.wait_closed()
    assert (await http.get(door + PATH)).status == 200


async def test_what_a_service_cannot_take_is_refused_at_once(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    go, waiting = asyncio.Event(), 0

    async def waits(request: web.Request) -> web.Response:
        nonlocal waiting
        if request.method == "GET":
            waiting += 1
            await go.wait()
        return web.json_response({})

    door = await world.gateway(await world.service(waits), await world.service(waits), upstream_max_connections=8)
    async with asyncio.TaskGroup() as group:
        served = [group.create_task(http.get(door + PATH)) for _ in range(8)]

        async def all_wait() -> bool:
            return waiting == 8

        await eventually(all_wait)
        refused = await http.get(door + PATH)
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        # What goes at its caller's pace has no place to take. And the gateway itself answers.
        written = await http.post(f"{door}/api/v1/webhooks", data=b"{}", headers=keys.bearer())
        assert written.status == 200
        assert (await http.get(f"{door}/api/v1")).status == 200
        go.set()
    assert [task.result().status for task in served] == [200] * 8
    assert (await http.get(door + PATH)).status == 200


async def test_an_instance_that_is_about_to_stop_is_left_before_it_does(
    world: World, http: aiohttp.ClientSession, opened: AsyncExitStack
) -> None:
    asked: list[str] = []
    listeners = {}
    for name in ("stays", "stops"):

        async def answer(_request: web.Request, name: str = name) -> web.Response:
            asked.append(name)
            return web.json_response({})

        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        listeners[name] = await opened.enter_async_context(listening(app, ProcessSettings(shutdown_seconds=1), 0))
    door = await world.gateway(*(f"http://127.0.0.1:{listener.port}" for listener in listeners.values()))

    async def both_asked() -> bool:
        assert (await http.get(door + PATH)).status == 200
        return {"stays", "stops"} <= set(asked)

    await eventually(both_asked, every=0)
    listeners["stops"].drain()
    asked.clear()
    for _ in range(40):
        assert (await http.get(door + PATH)).status == 200
    assert asked.count("stops") <= 3


async def test_instances_are_looked_up_by_name(world: World, http: aiohttp.ClientSession) -> None:
    port = urlsplit(await world.service(well)).port
    door = await world.gateway(f"dns+http://localhost:{port}")
    assert (await http.get(door + PATH)).status == 200
