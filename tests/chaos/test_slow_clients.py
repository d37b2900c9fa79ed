"""Two thousand idle callers and two hundred slow ones: the others are served as if there were none."""

import asyncio
import contextlib
import resource
import statistics
import time

import aiohttp
import psutil
import pytest
from aiohttp import web

from shared.testing import eventually
from tests.chaos.gateways import Gateway, in_front_of

pytestmark = pytest.mark.timeout(180)

IDLE = 2000
SLOW = 200
PATH = "/api/v1/users/01a21311-b5a5-726d-b20a-ab0db8c16c9f"
REQUEST = f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def service(request: web.Request) -> web.Response:
    await request.read()
    return web.json_response({"id": "x"})


class Caller:
    """A connection that says little."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connected(cls, gateway: Gateway) -> "Caller":
        return cls(*await asyncio.open_connection("127.0.0.1", gateway.port))

    async def ask(self) -> None:
        self.writer.write(REQUEST)
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            await self.reader.readexactly(len(b'{"id": "x"}'))

    @property
    def cut(self) -> bool:
        return self.reader.at_eof() or self.reader.exception() is not None

    async def drip(self, head: bytes) -> None:
        """Send a byte now and then until the gateway has had enough."""
        self.writer.write(head)
        with contextlib.suppress(ConnectionError):
            while not self.cut:
                self.writer.write(b"x")
                await asyncio.sleep(0.25)
                if not self.reader.at_eof():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.01):
                            await self.reader.read(1000)

    async def close(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def typical(gateway: Gateway) -> float:
    """Median milliseconds of a request over one kept connection."""
    caller = await Caller.connected(gateway)
    times = []
    for _ in range(300):
        began = time.perf_counter()
        await caller.ask()
        times.append((time.perf_counter() - began) * 1000)
    await caller.close()
    return statistics.median(times)


async def test_idle_and_slow_callers_harm_nobody() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with (
        aiohttp.ClientSession() as http,
        in_front_of(service, http, HEAD_SECONDS="3", STALL_SECONDS="3") as gateway,
    ):
        process = psutil.Process(gateway.pid)
        alone = await typical(gateway)
        before = process.memory_info().rss
        idle = []
        for _ in range(IDLE):
            idle.append(await Caller.connected(gateway))
            await idle[-1].ask()
        memory = (process.memory_info().rss - before) / IDLE
        slow = [await Caller.connected(gateway) for _ in range(SLOW)]
        heads = (REQUEST[:20], b"POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
        dripping = [asyncio.create_task(caller.drip(heads[n % 2])) for n, caller in enumerate(slow)]
        among = await typical(gateway)

        async def all_cut() -> bool:
            left = [n % 2 for n, task in enumerate(dripping) if not task.done()]
            assert not left, f"still open: {left.count(0)} with a head, {left.count(1)} with a body"
            return True

        await eventually(all_cut, within=60)
        await asyncio.gather(*dripping)
        for caller in idle:  # none of them was taken for a slow one
            await caller.ask()
        print(
            f"\n{memory / 1024:.1f} KiB for each of {IDLE} idle connections; a request takes {alone:.2f} ms alone, "
            f"{among:.2f} ms among them and {SLOW} slow ones, all of which were cut"
        )
        for caller in (*idle, *slow):
            await caller.close()
        assert memory < 64 * 1024
