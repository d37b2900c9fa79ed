"""Five times as many requests as a service can answer."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web

from shared.testing import eventually
from tests.chaos.gateways import Gateway, in_front_of

pytestmark = pytest.mark.timeout(180)

AT_A_TIME = 4
SECONDS = 0.1
CAPACITY = AT_A_TIME / SECONDS
PATIENCE = 1.0
REQUEST = b"GET /api/v1/users/01a21311-b5a5-726d-b20a-ab0db8c16c9f HTTP/1.1\r\nHost: x\r\n\r\n"


class Service:
    """Works on so many requests at a time, for so long each; the others wait, as they do for a database."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(AT_A_TIME)

    async def answer(self, _request: web.Request) -> web.Response:
        async with self._free:
            await asyncio.sleep(SECONDS)
        return web.json_response({"id": "x"})


class Caller(asyncio.Protocol):
    """A kept connection, as cheap as can be: five times the load is not to be too much for this side of it."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._transport: asyncio.Transport
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self) -> None:
        self._transport.write(REQUEST)
        self._patience = asyncio.get_running_loop().call_later(PATIENCE, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._patience is not None:  # an answer is so short that it comes in one piece
            self._end(int(data[9:12]))
            self._load.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._load.idle:
            self._load.idle.remove(self)
        if self._patience is not None:
            self._end(0)

    def close(self) -> None:
        self._transport.abort()

    def _give_up(self) -> None:
        self._end(0)
        self.close()

    def _end(self, status: int) -> None:
        assert self._patience is not None
        self._patience.cancel()
        self._patience = None
        self._load.ended(status)


@dataclass
class Load:
    """So many requests a second, whatever becomes of them; good is what is answered while somebody still waits."""

    gateway: Gateway
    good: list[float] = field(default_factory=list)  # when
    statuses: dict[int, int] = field(default_factory=dict)
    idle: list[Caller] = field(default_factory=list)
    under_way: int = 0

    def ended(self, status: int) -> None:
        self.under_way -= 1
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.good.append(time.monotonic())

    async def _one(self) -> None:
        self.under_way += 1
        if self.idle:
            caller = self.idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, caller = await loop.create_connection(lambda: Caller(self), "127.0.0.1", self.gateway.port)
        caller.ask()

    async def run(self, rate: float, seconds: float, settle: float = 0.0) -> float:
        """Good answers a second, after `settle` seconds."""
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            sent = 0
            while (now := time.monotonic()) < begin + seconds:
                for _ in range(int((now - begin) * rate) - sent):
                    group.create_task(self._one())
                    sent += 1
                await asyncio.sleep(0.005)

        async def all_ended() -> bool:
            return self.under_way == 0

        await eventually(all_ended)
        for caller in list(self.idle):
            caller.close()
        return sum(begin + settle <= at <= begin + seconds for at in self.good) / (seconds - settle)


async def upstream_metrics(gateway: Gateway, http: aiohttp.ClientSession) -> list[str]:
    """What the gateway says of the service, for who looks for a reason."""
    async with http.get(f"{gateway.admin}/metrics") as response:
        lines = (await response.text()).splitlines()
    return [line for line in lines if line.startswith("tenfold_upstream_") and 'upstream="users"' in line]


@asynccontextmanager
async def watching(gateway: Gateway, http: aiohttp.ClientSession) -> AsyncIterator[list[float]]:
    """How long readiness takes to answer, in milliseconds; it must."""
    times: list[float] = []

    async def ask() -> None:
        while True:
            began = time.perf_counter()
            async with http.get(f"{gateway.admin}/health/ready", timeout=aiohttp.ClientTimeout(total=5)) as response:
                assert response.status == 200
            times.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(ask())
    try:
        yield times
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_five_times_the_load_keeps_nine_tenths_of_the_goodput() -> None:
    async with (
        aiohttp.ClientSession() as http,
        in_front_of(Service().answer, http) as gateway,
    ):
        await Load(gateway).run(CAPACITY * 0.5, 4)
        peak = await Load(gateway).run(CAPACITY, 6, settle=1)
        print("", *await upstream_metrics(gateway, http), sep="\n")
        load = Load(gateway)
        async with watching(gateway, http) as readiness:
            good = await load.run(CAPACITY * 5, 15)  # from the first second, when the limit is still at its cap
        print(
            f"\npeak {peak:.0f}/s of {CAPACITY:.0f}/s possible; at 5 times the load {good:.0f}/s, "
            f"{good / peak:.0%} of the peak; answers {load.statuses} (0: nobody waited any more); readiness "
            f"{statistics.median(readiness):.0f} ms, at most {max(readiness):.0f} ms"
        )
        print(*await upstream_metrics(gateway, http), sep="\n")
        assert good >= 0.9 * peak
        assert load.statuses.get(503, 0) > 0
