"""The pool to one PostgreSQL server: everything bounded, measured, and given back whatever happens to the caller."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from shared import metrics
from shared.errors import Unavailable
from shared.settings import DataSettings

CONNECT_SECONDS = 3.0
CLOSE_SECONDS = 3.0
_IDLE_SECONDS = 60.0
# A connection or server that is gone, or a primary that was demoted: another attempt finds another connection.
GONE = (
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.TooManyConnectionsError,
)

_POOL = ("service", "target")
ACQUIRE = metrics.Histogram(
    "tenfold_database_acquire_seconds",
    "Wait for a pooled connection",
    _POOL,
    buckets=(0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5),
)
SIZE = metrics.Gauge("tenfold_database_pool_connections", "Open connections of a pool", _POOL)
IN_USE = metrics.Gauge("tenfold_database_pool_in_use", "Connections in use", _POOL)
WAITING = metrics.Gauge("tenfold_database_pool_waiting", "Callers that wait for a connection", _POOL)
EXHAUSTED = metrics.Counter("tenfold_database_pool_exhausted_total", "Callers that got no connection in time", _POOL)


class PoolExhausted(Unavailable):
    """Every connection is in use. It says nothing against the server."""


class Lease:
    """A connection in the hands of one caller, and the transaction it has begun on it."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._block: Any = None

    async def begin(self) -> None:
        self._block = self.connection.transaction()
        await self._block.start()

    async def commit(self) -> None:
        await self._block.commit()
        self._block = None

    async def roll_back(self) -> None:
        """Undo what was begun and not committed. Where its state is not known it is cut, and the server undoes it."""
        if self._block is None or self.connection.is_closed():
            return
        if self.connection.is_in_transaction():
            await self._block.rollback()
        else:
            self.connection.terminate()


class Server:
    """One PostgreSQL server and the pool to it."""

    def __init__(self, name: str, service: str, settings: DataSettings, connect: Callable[..., Awaitable[Any]]) -> None:
        self.name = name
        self.in_flight = 0
        self.waiting = 0
        self._acquire_seconds = settings.database_acquire_seconds
        self._labels = (service, name)
        self._exhausted = metrics.child(EXHAUSTED, service, name)
        self._waits = metrics.child(ACQUIRE, service, name)
        self._returning: set[asyncio.Task[None]] = set()
        options: dict[str, Any] = connect_options(service, settings) | {"connect": connect}
        self.pool: asyncpg.Pool[asyncpg.Record] = asyncpg.create_pool(
            min_size=0,
            max_size=settings.database_pool_max,
            max_inactive_connection_lifetime=_IDLE_SECONDS,
            init=_keepalive,
            reset=_no_reset,
            **options,
        )
        gauges: dict[metrics.Gauge, Callable[[], float]] = {
            SIZE: self.pool.get_size,
            IN_USE: lambda: self.in_flight,
            WAITING: lambda: self.waiting,
        }
        for gauge, ask in gauges.items():
            metrics.child(gauge, *self._labels).set_function(ask)

    async def open(self) -> None:
        """Ready the pool. It connects when it is first asked to, so a server that is away hinders nobody's start."""
        await self.pool

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Lease]:
        """A connection from the pool. Raises `PoolExhausted` when none is free in time, `Unavailable` when there is no
        server.

        Who is cancelled, or whose statement hangs, leaves at once; the connection is set right behind its back.
        """
        lease = Lease(await self._acquire())
        self.in_flight += 1
        try:
            yield lease
        except (TimeoutError, asyncio.CancelledError, GeneratorExit):
            task = asyncio.create_task(self._give_back(lease))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
            raise
        except BaseException:
            await self._give_back(lease)
            raise
        await self._give_back(lease)

    async def _acquire(self) -> Any:
        started = time.perf_counter()
        self.waiting += 1
        try:
            return await self.pool.acquire(timeout=self._acquire_seconds)
        except TimeoutError:
            # The driver waits for a free connection and for a new one's handshake under one timeout.
            if self.in_flight >= self.pool.get_max_size():
                self._exhausted.inc()
                raise PoolExhausted("no database connection became free in time") from None
            raise Unavailable("the database does not answer") from None
        except (OSError, asyncpg.InterfaceError, *GONE) as error:
            raise Unavailable("the database is away") from error
        finally:
            self.waiting -= 1
            self._waits.observe(time.perf_counter() - started)

    async def _give_back(self, lease: Lease) -> None:
        try:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await lease.roll_back()
            except BaseException:
                lease.connection.terminate()
                raise
            finally:
                await self.pool.release(lease.connection, timeout=CLOSE_SECONDS)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pass  # it was cut, and the pool opens another
        finally:
            self.in_flight -= 1

    async def close(self) -> None:
        """Close the pool; cut it when that takes too long, as behind a frozen server."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.pool.close()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self.pool.terminate()
        for task in list(self._returning):
            task.cancel()
        await asyncio.gather(*self._returning, return_exceptions=True)
        for gauge in (SIZE, IN_USE, WAITING):
            metrics.child(gauge, *self._labels).set_function(lambda: 0)


def connect_options(service: str, settings: DataSettings) -> dict[str, Any]:
    """How every connection of this service is made, pooled or not."""
    return {
        "timeout": CONNECT_SECONDS,
        "command_timeout": settings.database_statement_seconds,
        "statement_cache_size": 0 if settings.database_pgbouncer else 100,
        "server_settings": {} if settings.database_pgbouncer else {"application_name": f"tenfold-{service}"},
    }


async def cut(connection: Any) -> None:
    """Close a connection outside of any pool, in order if that is quick."""
    with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        await connection.close(timeout=0.5)


async def _keepalive(connection: Any) -> None:
    """Notice within about 25 s that the peer is gone; the driver sets nothing and does not show its socket."""
    peer = connection._transport.get_extra_info("socket")
    if peer is not None and peer.family != socket.AF_UNIX:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def _no_reset(_connection: object) -> None:
    """Nothing to reset: no session state is used. The query would cost a third of a short read."""
