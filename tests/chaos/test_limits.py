"""One limit, four gateways under load: how much more passes than may, with Redis and after it was killed."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from devstack import redis
from devstack.ports import free_port
from tests.chaos.gateways import in_front_of

GATEWAYS = 4
CALLERS = 3  # of each gateway
BURST, SECONDS = 200, 2.0
RATE = BURST / SECONDS
MEASURED_SECONDS = 4.0


async def ok(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


@asynccontextmanager
async def killable_redis(data: Path) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        redis.binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(data),
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield port, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def load(urls: list[str], http: aiohttp.ClientSession) -> tuple[int, int, float]:
    """How many passed, how many were asked, and in how many seconds: of one caller, through all doors at once."""
    counted = {200: 0, 429: 0}
    started = time.monotonic()

    async def call(url: str) -> None:
        while time.monotonic() - started < MEASURED_SECONDS:
            async with http.get(f"{url}/api/v1/media/1/original") as answer:
                counted[answer.status] += 1

    await asyncio.gather(*(call(url) for url in urls for _ in range(CALLERS)))
    return counted[200], sum(counted.values()), time.monotonic() - started


async def test_what_passes_of_one_limit_through_four_gateways(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        port, server = await stack.enter_async_context(killable_redis(tmp_path))
        doors = [
            await stack.enter_async_context(
                in_front_of(
                    ok,
                    http,
                    REDIS_URL=f"redis://127.0.0.1:{port}/0",
                    LIMIT_DEFAULT=f"{BURST}/{SECONDS:g}",
                    GATEWAY_INSTANCES=str(GATEWAYS),
                )
            )
            for _ in range(GATEWAYS)
        ]
        urls = [door.url for door in doors]
        for state in ("Redis there", "Redis killed"):
            if state == "Redis killed":
                server.kill()
                await server.wait()
            passed, asked, seconds = await load(urls, http)
            allowed = BURST + RATE * seconds
            print(
                f"\n{state}: {passed} of {asked} passed in {seconds:.2f} s, {allowed:.0f} may: "
                f"overshoot {max(0.0, passed / allowed - 1):.2%}"
            )
            assert asked > 1.5 * allowed  # else there was nothing to limit
            assert BURST <= passed <= allowed + 1
