"""Many open live streams on one process of notifier."""

import asyncio
import os
import resource
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import UUID

import aiohttp
import msgspec
import psutil
import pytest

from devstack.ports import free_port
from devstack.stack import Stack
from devstack.topology import Topology
from services.notifier.streams import MAX_STREAMS_A_USER
from shared import migrate
from shared.database import Database
from shared.health import Health
from shared.ids import new_id
from shared.redis import Redis
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import SERVICES
from tests.issuer import Issuer

pytestmark = pytest.mark.timeout(300)

STREAMS = 5000
WARM = 200
AT_ONCE = 16
MOST_KIB = 64.0


class Listener(asyncio.Protocol):
    """A reader that holds next to nothing: it only counts."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._seen = b""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if b"retry:" in self._seen and not self.opened.done():
            self.opened.set_result(None)

    def connection_lost(self, _error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(self._seen.decode()))

    @property
    def events(self) -> int:
        return self._seen.count(b"event: notification\n")

    @property
    def heartbeats(self) -> int:
        return self._seen.count(b"\n:\n")


class Api:
    """`python -m services.notifier api`, on servers of its own."""

    def __init__(
        self, process: psutil.Process, port: int, admin: int, issuer: Issuer, db: Database, redis: Redis
    ) -> None:
        self.process = process
        self.port = port
        self.admin = admin
        self.issuer = issuer
        self.db = db
        self.redis = redis

    @classmethod
    @asynccontextmanager
    async def opened(cls, root: Path) -> "AsyncIterator[Api]":
        async with AsyncExitStack() as exits:
            topology = Topology.backing(replicas=0, broker="none")
            stack = await exits.enter_async_context(Stack(topology, root=root, durable=False, keep_data=False))
            url = stack.database_url("notifier")
            await migrate.migrate(url, "notifier", SERVICES / "notifier" / "migrations")
            issuer = await exits.enter_async_context(Issuer().serving())
            settings = DataSettings(database_url=url, bus="inline")
            db = await exits.enter_async_context(Database.opened("notifier", settings, Health()))
            assert stack.urls.redis
            redis = await exits.enter_async_context(Redis.opened(stack.urls.redis))
            port, admin = free_port(), free_port()
            env = os.environ | {
                "DATABASE_URL": url, "BUS": "inline", "REDIS_URL": stack.urls.redis, "JWKS_URL": issuer.url,
                "SMTP_URL": stack.urls.smtp, "LINK_SECRET": "l" * 32, "LOG_LEVEL": "warning", "DRAIN_SECONDS": "0",
                "PORT": str(port), "ADMIN_PORT": str(admin), "STREAM_HEARTBEAT_SECONDS": "5",
            }  # fmt: skip
            program = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.notifier", "api", env=env)
            try:
                api = cls(psutil.Process(program.pid), port, admin, issuer, db, redis)
                await eventually(api.ready, within=60)
                yield api
            finally:
                program.terminate()
                async with asyncio.timeout(40):
                    await program.wait()

    async def ready(self) -> bool:
        try:
            async with aiohttp.request("GET", f"http://127.0.0.1:{self.admin}/health/ready") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def open_streams(self) -> int:
        """As its own metric says."""
        async with aiohttp.request("GET", f"http://127.0.0.1:{self.admin}/metrics") as response:
            lines = (await response.text()).splitlines()
        return int(float(next(line for line in lines if line.startswith("tenfold_notifier_streams ")).split()[1]))

    async def listen(self, users: list[UUID]) -> list[Listener]:
        """A stream for each; a user may be named more than once."""
        gate = asyncio.Semaphore(AT_ONCE)
        loop = asyncio.get_running_loop()

        async def one(user: UUID) -> Listener:
            request = (
                "GET /api/v1/notifications/stream HTTP/1.1\r\nHost: notifier\r\nAccept: text/event-stream\r\n"
                f"Authorization: Bearer {self.issuer.token(user)}\r\n\r\n"
            )

            async def opened() -> Listener:
                _, listener = await loop.create_connection(lambda: Listener(request.encode()), "127.0.0.1", self.port)
                try:
                    await listener.opened
                except ConnectionError as refused:
                    raise AssertionError(refused) from refused
                return listener

            async with gate:
                return await eventually(opened, within=120, every=0.5)  # clients come again when it was too busy

        return await asyncio.gather(*(one(user) for user in users))

    async def tell(self, users: list[UUID]) -> None:
        """Something happened to each of them; announced as the worker does."""
        async with self.db.transaction() as tx:
            await tx.execute("INSERT INTO recipients (user_id, stream_position) SELECT unnest($1::uuid[]), 1", users)
            await tx.execute(
                "INSERT INTO stream_entries (user_id, position, event, data)"
                " SELECT unnest($1::uuid[]), 1, 'notification', '{}'",
                users,
            )
        wakes = {str(user): 1 for user in users}
        await self.redis.call("PUBLISH", "tenfold:notifier:wakes", msgspec.json.encode(wakes))


async def test_five_thousand_streams_are_open_on_one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most == resource.RLIM_INFINITY or most > STREAMS + 500, f"needs ulimit -Hn above {STREAMS + 500}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    async with Api.opened(tmp_path_factory.mktemp("streams")) as api:
        for listener in await api.listen([new_id() for _ in range(WARM)]):  # so that what is made once is made
            assert listener.transport is not None
            listener.transport.close()

        async def none_open() -> bool:
            return await api.open_streams() == 0

        await eventually(none_open, within=30)
        before = api.process.memory_info().rss
        people = [new_id() for _ in range(STREAMS // MAX_STREAMS_A_USER)]
        started = time.perf_counter()
        listeners = await api.listen(people * MAX_STREAMS_A_USER)
        opening = time.perf_counter() - started
        assert await api.open_streams() == STREAMS
        each = (api.process.memory_info().rss - before) / STREAMS / 1024

        told = time.perf_counter()
        await api.tell(people)

        async def all_heard() -> bool:
            return all(listener.events for listener in listeners)

        await eventually(all_heard, within=60)
        hearing = time.perf_counter() - told
        assert {listener.events for listener in listeners} == {1}

        async def all_beat() -> bool:
            return all(listener.heartbeats for listener in listeners)

        cpu = sum(api.process.cpu_times()[:2])
        await eventually(all_beat, within=60)
        cpu = sum(api.process.cpu_times()[:2]) - cpu
        print(
            f"{STREAMS} streams opened in {opening:.1f} s, {each:.1f} KiB each; an event for everybody was on all after"
            f" {hearing:.2f} s; CPU until each had a heartbeat (every 5 s): {cpu:.2f} s"
        )
        assert each < MOST_KIB
        for listener in listeners:
            assert listener.transport is not None
            listener.transport.close()
        await eventually(none_open, within=30)
