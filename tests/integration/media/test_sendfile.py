"""Files that go from the disk to the socket, on both loops, to readers of any pace."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web

from services.media.delivery import _send_file
from services.media.ranges import Span
from shared.errors import NotFound
from tests.integration.media.conftest import serving

Run = Callable[[Coroutine[Any, Any, None]], None]
DATA = os.urandom(9 * 2**20 + 17)


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """On a loop of that kind, in a thread of its own."""

    def in_thread(main: Coroutine[Any, Any, None]) -> None:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                request.param(main)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    return in_thread


def _application(path: Path) -> web.Application:
    async def answer(request: web.Request) -> web.StreamResponse:
        span = Span(int(request.query["start"]), int(request.query["length"]))
        response = web.StreamResponse()
        response.content_length = span.length
        try:
            await _send_file(request, response, path, span)
        except NotFound:
            return web.Response(status=404)
        return response

    application = web.Application()
    application.router.add_get("/", answer)
    return application


@pytest.mark.parametrize("span", [(0, len(DATA)), (5, 3), (1, len(DATA) - 1), (7, 2**20), (0, 128 * 1024)])
def test_arrives_whole(run: Run, tmp_path: Path, span: tuple[int, int]) -> None:
    (tmp_path / "file").write_bytes(DATA)
    start, length = span

    async def main() -> None:
        async with serving(_application(tmp_path / "file")) as url, aiohttp.ClientSession() as http:
            for _ in range(3):  # on one connection
                async with http.get(url, params={"start": start, "length": length}) as answer:
                    assert await answer.read() == DATA[start : start + length]

    run(main())


def test_many_at_a_time_and_one_that_goes_away(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)

    async def main() -> None:
        async with serving(_application(tmp_path / "file")) as url, aiohttp.ClientSession() as http:
            whole = {"start": 0, "length": len(DATA)}
            async with http.get(url, params=whole) as leaving:
                await leaving.content.readexactly(1000)
                leaving.close()

            async def slowly() -> bytes:
                async with http.get(url, params=whole) as answer:
                    received = b""
                    while piece := await answer.content.read(2**20):
                        received += piece
                        await asyncio.sleep(0)
                    return received

            assert all(got == DATA for got in await asyncio.gather(*(slowly() for _ in range(5))))

    run(main())


def test_what_is_gone_is_not_found(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            serving(_application(tmp_path / "none")) as url,
            aiohttp.ClientSession() as http,
            http.get(url, params={"start": 0, "length": 5}) as answer,
        ):
            assert answer.status == 404

    run(main())
