"""A service that has more to do than it can."""

import asyncio
from contextlib import AsyncExitStack

import aiohttp

from shared import metrics
from shared.application import Access, Call, Reply, Route, build
from shared.listener import listening
from shared.middleware import CONTEXT
from shared.settings import ProcessSettings
from shared.testing import eventually


class Handlers:
    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.waiting = 0

    async def work(self, call: Call) -> Reply[str]:
        self.waiting += 1
        await self.go.wait()
        return Reply("done")

    async def log_in(self, call: Call) -> Reply[str]:
        return Reply("in")

    async def stream(self, call: Call) -> Reply[str]:
        return Reply("streamed")


async def test_what_is_too_much_is_refused_at_once_and_the_first_are_served(opened: AsyncExitStack) -> None:
    h = Handlers()
    routes = [
        Route("GET", "/work", h.work, Access.PUBLIC),
        Route("POST", "/work", h.work, Access.PUBLIC),
        Route("POST", "/sessions", h.log_in, Access.PUBLIC, first=True),
        Route("GET", "/stream", h.stream, Access.PUBLIC, streaming=True),
    ]
    own = ProcessSettings(max_concurrent_requests=20)
    app = build("shedding", routes, None, own)
    limit = app[CONTEXT].limit
    limit.limit = 10.0
    listener = await opened.enter_async_context(listening(app, own, 0))
    http = await opened.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{listener.port}"))
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        served = [group.create_task(http.get("/work")) for _ in range(10)]

        async def all_wait() -> bool:
            return h.waiting == 10

        await eventually(all_wait)
        for refused in [await http.get("/work"), await http.post("/work", data=bytes(1000))]:
            assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
            assert (await refused.json(content_type=None))["type"] == "urn:tenfold:error:unavailable"
        for method, path in (("POST", "/sessions"), ("GET", "/stream")):
            assert (await http.request(method, path)).status == 200
        h.go.set()
    assert [(await answer).status for answer in served] == [200] * 10
    assert limit.in_flight == 0
    assert metrics.child(metrics.HTTP_SHED, "shedding")._value.get() == 2


async def test_whoever_sends_its_body_slowly_takes_nobodys_place(opened: AsyncExitStack) -> None:
    class Taking:
        async def take(self, call: Call, body: list[int]) -> Reply[int]:
            return Reply(len(body))

    own = ProcessSettings(max_concurrent_requests=1)
    app = build("slow-bodies", [Route("POST", "/", Taking().take, Access.PUBLIC)], None, own)
    listener = await opened.enter_async_context(listening(app, own, 0))
    http = await opened.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{listener.port}"))
    slow = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(5)]
    try:
        for _, writer in slow:
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n[1")
        assert (await http.post("/", json=[1, 2, 3])).status == 200
        for reader, writer in slow:
            writer.write(b"1]")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    finally:
        for _, writer in slow:
            writer.close()
            await writer.wait_closed()
