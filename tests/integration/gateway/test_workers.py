"""`WORKERS=n`, with real processes."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import psutil
import pytest

from devstack.ports import free_port
from shared.testing import eventually

NUMBER = 3


class Workers:
    def __init__(self, process: asyncio.subprocess.Process, port: int, admin: int, http: aiohttp.ClientSession) -> None:
        self.process = process
        self.port = port
        self._admin = admin
        self._http = http

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    async def ready(self) -> bool:
        for index in range(NUMBER):
            try:
                answer = await self._http.get(f"http://127.0.0.1:{self._admin + index}/health/ready")
            except aiohttp.ClientError:
                return False
            if answer.status != 200:
                return False
        return True

    async def served(self) -> None:
        for _ in range(20):
            async with self._http.get(
                f"http://127.0.0.1:{self.port}/api/v1", headers={"Connection": "close"}
            ) as answer:
                assert answer.status == 200


def ports_in_a_row() -> int:
    """The first of so many that are free."""
    while True:
        first = free_port()
        if all(free_port(first + index) == first + index for index in range(NUMBER)):
            return first


@asynccontextmanager
async def started(too_soon: float = 0.0, **environ: str) -> AsyncIterator[Workers]:
    port, admin = free_port(), ports_in_a_row()
    program = (
        f"from shared import workers; workers._TOO_SOON_SECONDS = {too_soon}\n"
        "import sys; from shared.runner import run; from services.gateway.app import SERVICE\n"
        "sys.exit(run([(SERVICE, 'api')]))"
    )
    own = {
        "WORKERS": str(NUMBER),
        "PORT": str(port),
        "ADMIN_PORT": str(admin),
        "DRAIN_SECONDS": "0",
        "JWKS_URL": "http://127.0.0.1:1/",
        **{f"UPSTREAM_{name}": "http://127.0.0.1:1" for name in ("USERS", "MEDIA", "NOTIFIER")},
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env={**os.environ, **own, **environ}, stdout=asyncio.subprocess.DEVNULL
    )
    async with aiohttp.ClientSession() as http:
        try:
            yield Workers(process, port, admin, http)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_they_share_a_port_and_one_that_dies_is_started_anew() -> None:
    async with started() as workers:
        await eventually(workers.ready, within=60)
        await workers.served()
        before = workers.pids
        assert len(before) == NUMBER
        os.kill(before[1], signal.SIGKILL)

        async def replaced() -> bool:
            return len(workers.pids) == NUMBER and before[1] not in workers.pids

        await eventually(replaced)
        await eventually(workers.ready, within=60)
        await workers.served()
        workers.process.terminate()
        assert await asyncio.wait_for(workers.process.wait(), 15) == 0


async def test_they_end_when_one_cannot_live() -> None:
    async with started(too_soon=60) as workers:
        await eventually(workers.ready, within=60)
        os.kill(workers.pids[0], signal.SIGKILL)
        assert await asyncio.wait_for(workers.process.wait(), 15) == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_none_outlives_its_parent(end: signal.Signals) -> None:
    async with started() as workers:
        await eventually(workers.ready, within=60)
        pids = workers.pids
        workers.process.send_signal(end)

        async def gone() -> bool:
            return not any(psutil.pid_exists(pid) for pid in pids)

        await eventually(gone)
