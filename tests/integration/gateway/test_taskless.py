"""What is passed on without waking the connection's task, and where the task has to take over."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from services.gateway import headers
from services.gateway.headers import Head
from services.gateway.proxy import FAILURES, Proxy, Request
from services.gateway.upstream_pool import Answer, Pool
from shared import metrics
from shared.resilience import Fleet
from shared.testing import eventually
from tests.backing import Backing
from tests.integration.gateway.conftest import AccessLog, Keys, World

PATH = "/api/v1/media/1/original"


class Caller:
    """One connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bearer: str) -> None:
        self.reader = reader
        self.writer = writer
        self._bearer = bearer

    def send(self, *paths: str, method: str = "GET", headers: str = "") -> None:
        self.writer.write(
            "".join(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {self._bearer}\r\n{headers}\r\n"
                for path in paths
            ).encode()
        )

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the next one."""
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            return int(head.split()[1]), await self.reader.readexactly(int(length))

    async def ask(self, path: str, **more: str) -> tuple[int, bytes]:
        self.send(path, **more)
        return await self.answer()


@asynccontextmanager
async def calling(door: str, keys: Keys) -> AsyncIterator[Caller]:
    """A caller whose connection the gateway knows already, as it does the service's."""
    parts = urlsplit(door)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    caller = Caller(reader, writer, keys.bearer()["Authorization"])
    try:
        for path in ("/api/v1/media", PATH):
            assert await caller.ask(path) == (200, b"/api/v1/media" if path == "/api/v1/media" else PATH.encode())
        yield caller
    finally:
        writer.close()


async def path(request: web.Request) -> web.Response:
    return web.Response(text=request.path)


class Hanging:
    """A service that answers with the path until told to hang."""

    def __init__(self) -> None:
        self.hangs = False
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.left = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        if self.hangs:
            self.asked.set()
            try:
                await self.go.wait()
            finally:
                self.left.set()
        return await path(request)


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the task was needed for."""
    seen: list[str] = []
    rest = Proxy.rest

    async def noted(self: Proxy, request: Request) -> bool:
        seen.append(request.target)
        return await rest(self, request)

    monkeypatch.setattr(Proxy, "rest", noted)
    return seen


@pytest.fixture
def fleets(monkeypatch: pytest.MonkeyPatch) -> list[Fleet[Pool]]:
    """Every fleet that is made."""
    made: list[Fleet[Pool]] = []
    init = Fleet.__init__

    def noted(self: Fleet[Pool], *given: Any) -> None:
        init(self, *given)
        made.append(self)

    monkeypatch.setattr(Fleet, "__init__", noted)
    return made


async def all_free(fleets: list[Fleet[Pool]]) -> bool:
    """Whether everything that was taken has been given back."""
    return not any(fleet.limit.in_flight or fleet.instances.choose().in_flight for fleet in fleets)  # type: ignore[union-attr]


async def test_what_most_requests_are_needs_no_task(world: World, keys: Keys, rests: list[str]) -> None:
    door = await world.in_front_of(path)
    async with calling(door, keys) as caller:
        del rests[:]
        assert await caller.ask("/api/v1/media?a=1") == (200, b"/api/v1/media")
        assert await caller.ask(PATH) == (200, PATH.encode())
        assert (await caller.ask("/api/v1/nothing"))[0] == 404  # of the application
        assert await caller.ask(PATH) == (200, PATH.encode())
        assert rests == []
        assert (await caller.ask("/api/v1/media/../x"))[0] == 400
        assert rests == ["/api/v1/media/../x"]


async def test_with_the_limit_in_redis_too(world: World, keys: Keys, rests: list[str], backing: Backing) -> None:
    door = await world.in_front_of(path, redis_url=backing.redis, limit_default="5/600")
    async with calling(door, keys) as caller:
        del rests[:]
        statuses = [(await caller.ask("/api/v1/media"))[0] for _ in range(7)]
        assert statuses == [200] * 3 + [429] * 4
        assert rests == []


async def test_pipelined_requests_are_answered_in_order(world: World, keys: Keys) -> None:
    service = Hanging()
    door = await world.in_front_of(service.answer)
    async with calling(door, keys) as caller, calling(door, keys) as other:
        paths = [f"/api/v1/media/{number}/original" for number in range(20)]
        service.hangs = True
        caller.send(paths[0])
        await service.asked.wait()
        service.hangs = False
        caller.send(*paths[1:])
        assert await other.ask(PATH) == (200, PATH.encode())  # so the gateway has read them
        service.go.set()
        caller.send(*paths)
        assert [(await caller.answer())[1].decode() for _ in range(40)] == paths * 2


async def test_a_long_answer_goes_on_in_the_task(world: World, keys: Keys, rests: list[str]) -> None:
    go = asyncio.Event()

    async def slowly(request: web.Request) -> web.StreamResponse:
        if "long" not in request.query:
            return await path(request)
        response = web.StreamResponse(headers={"Content-Length": "2000000"})
        await response.prepare(request)
        await response.write(bytes(1_000_000))
        await go.wait()
        await response.write(bytes(1_000_000))
        return response

    door = await world.in_front_of(slowly)
    async with calling(door, keys) as caller:
        del rests[:]
        caller.send(f"{PATH}?long=1")
        await caller.reader.readuntil(b"\r\n\r\n")
        await caller.reader.readexactly(1_000_000)
        go.set()
        assert await caller.reader.readexactly(1_000_000) == bytes(1_000_000)
        assert rests == [f"{PATH}?long=1"]
        assert await caller.ask(PATH) == (200, PATH.encode())


async def test_a_caller_that_leaves_gives_its_place_back(
    world: World, keys: Keys, access_log: AccessLog, fleets: list[Fleet[Pool]]
) -> None:
    service = Hanging()
    door = await world.in_front_of(service.answer)
    async with calling(door, keys) as caller:
        service.hangs = True
        caller.send(PATH)
        await service.asked.wait()
    await asyncio.wait_for(service.left.wait(), 5)
    await eventually(lambda: all_free(fleets))

    async def gone() -> bool:
        return bool((await access_log())[-1]["status"] == 499)

    await eventually(gone)


async def test_what_takes_too_long_is_504_and_the_connection_is_kept(
    world: World, keys: Keys, fleets: list[Fleet[Pool]]
) -> None:
    service = Hanging()
    door = await world.in_front_of(service.answer)
    async with calling(door, keys) as caller:
        service.hangs = True
        assert (await caller.ask(PATH, headers="Request-Timeout: 200\r\n"))[0] == 504
        await asyncio.wait_for(service.left.wait(), 5)
        await eventually(lambda: all_free(fleets))
        service.hangs = False
        assert await caller.ask(PATH) == (200, PATH.encode())


async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(
    world: World, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service closes it just when the request is sent."""
    door = await world.in_front_of(path)
    begin = Pool.begin

    def cut(self: Pool, method: str, target: str, headers: bytes) -> Answer | None:
        answer = begin(self, method, target, headers)
        if answer is not None:
            answer._connection.transport.abort()
        return answer

    failures = metrics.child(FAILURES, "media", "no_answer")._value
    async with calling(door, keys) as caller:
        monkeypatch.setattr(Pool, "begin", cut)
        before = failures.get()
        for _ in range(3):
            assert await caller.ask(PATH) == (200, PATH.encode())
        assert failures.get() == before  # it is nobody's fault


async def test_what_fails_inside_is_500_and_gives_its_place_back(
    world: World, keys: Keys, fleets: list[Fleet[Pool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    door = await world.in_front_of(path)

    def fail(self: Pool, *_given: object) -> None:
        raise ValueError

    async with calling(door, keys) as caller:
        with monkeypatch.context() as patched:
            patched.setattr(Pool, "begin", fail)
            assert (await caller.ask(PATH))[0] == 500
        assert await all_free(fleets)
        assert await caller.ask(PATH) == (200, PATH.encode())


async def test_a_caller_that_leaves_before_its_limit_is_known_asks_nobody(
    world: World, keys: Keys, access_log: AccessLog, opened: AsyncExitStack
) -> None:
    answers, hears, deaf = {b"HELLO": b"%1\r\n+proto\r\n:3\r\n", b"SELECT": b"+OK\r\n"}, asyncio.Event(), False
    answers[b"EVALSHA"] = b"*3\r\n:1\r\n:0\r\n:1000\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if deaf:
                hears.set()
                continue
            for name, said in answers.items():
                writer.write(said * data.count(name))
        writer.close()

    server = await opened.enter_async_context(await asyncio.start_server(answer, "127.0.0.1", 0))
    asked: list[str] = []

    async def noting(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        return await path(request)

    port = server.sockets[0].getsockname()[1]
    door = await world.in_front_of(noting, redis_url=f"redis://127.0.0.1:{port}/0")
    async with calling(door, keys) as caller:
        deaf = True
        caller.send(f"{PATH}?last")
        await hears.wait()

    async def gone() -> bool:
        return bool((await access_log())[-1]["status"] == 499)

    await eventually(gone)
    async with calling(door, keys):  # Redis has been given up by now
        pass
    assert asked == ["/api/v1/media", PATH] * 2


async def test_who_takes_no_answers_is_not_given_more_and_more_of_them(world: World, keys: Keys) -> None:
    asked, most = 0, 500

    async def much(request: web.Request) -> web.Response:
        nonlocal asked
        if "much" not in request.query:
            return await path(request)
        asked += 1
        return web.Response(body=bytes(40_000))

    door = await world.in_front_of(much, limit_default="10000/1")
    async with calling(door, keys) as caller:
        for _ in range(most):
            caller.send(f"{PATH}?much")  # each meets a connection that waits for one
            await asyncio.sleep(0.002)
        assert asked < most / 2  # what the system keeps is some megabytes
        assert [await caller.answer() for _ in range(most)] == [(200, bytes(40_000))] * most


@pytest.mark.parametrize(
    ("header", "remembered"),
    [("X-Asks-For: x", True), ("X-Asks-For: " + "x" * 4000, False), ("X-User: " + "x" * 4000, False)],
)
async def test_a_large_head_is_not_remembered_whether_or_not_it_passes(
    world: World, keys: Keys, monkeypatch: pytest.MonkeyPatch, header: str, remembered: bool
) -> None:
    """Connections are many, and a head may have a megabyte."""
    door = await world.in_front_of(path)
    read, reads = headers.read, 0

    def counted(*given: Any) -> Head:
        nonlocal reads
        reads += 1
        return read(*given)

    async with calling(door, keys) as caller:
        monkeypatch.setattr(headers, "read", counted)
        for _ in range(2):
            assert await caller.ask(PATH, headers=f"{header}\r\n") == (200, PATH.encode())
    assert reads == (1 if remembered else 2)
