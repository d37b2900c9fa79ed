"""One PostgreSQL server: everything bounded, measured, and given back whatever happens to the caller."""

import asyncio
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import asyncpg

from shared import metrics
from shared.database.pool import FAILURES, Pool, Slot
from shared.database.session import Session
from shared.errors import Unavailable
from shared.settings import DataSettings

P = ParamSpec("P")
T = TypeVar("T")

_CONNECT_SECONDS = 3.0
_CLOSE_SECONDS = 3.0
# A connection or server that is gone, or a primary that was demoted: another attempt finds another connection.
GONE = (
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.TooManyConnectionsError,
    asyncpg.InternalClientError,
)

_POOL = ("service", "target")
ACQUIRE = metrics.Histogram(
    "tenfold_database_acquire_seconds",
    "Wait for a pooled connection, where none was free at once",
    _POOL,
    buckets=(0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5),
)
SIZE = metrics.Gauge("tenfold_database_pool_connections", "Open connections of a pool", _POOL)
IN_USE = metrics.Gauge("tenfold_database_pool_in_use", "Connections in use", _POOL)
WAITING = metrics.Gauge("tenfold_database_pool_waiting", "Callers that wait for a connection", _POOL)
EXHAUSTED = metrics.Counter("tenfold_database_pool_exhausted_total", "Callers that got no connection in time", _POOL)


class PoolExhausted(Unavailable):
    """Every connection is in use. It says nothing against the server."""


class Server(ABC):
    """One PostgreSQL server and the pool to it."""

    def __init__(self, name: str, service: str, settings: DataSettings) -> None:
        self.name = name
        self.pool = Pool(self._open, settings.database_pool_max)
        self.waiting = 0
        self._acquire_seconds = settings.database_acquire_seconds
        self._statement_seconds = settings.database_statement_seconds
        # How every connection of this service is made, pooled or not.
        self._options: dict[str, Any] = {
            "timeout": _CONNECT_SECONDS,
            "statement_cache_size": 0 if settings.database_pgbouncer else 100,
            "server_settings": {} if settings.database_pgbouncer else {"application_name": f"tenfold-{service}"},
        }
        self._labels = (service, name)
        self._exhausted = metrics.child(EXHAUSTED, service, name)
        self._waits = metrics.child(ACQUIRE, service, name)
        gauges: dict[metrics.Gauge, Callable[[], float]] = {
            SIZE: lambda: self.pool.size,
            IN_USE: lambda: self.pool.in_use,
            WAITING: lambda: self.waiting,
        }
        for gauge, ask in gauges.items():
            metrics.child(gauge, *self._labels).set_function(ask)

    @abstractmethod
    async def connect(self) -> Any:
        """A new connection of the driver, not of the pool; its user bounds what it asks."""

    async def run(self, query: Callable[Concatenate[Any, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `query(connection, ...)` with a connection of the pool.

        Raises what `query` does, and what `acquire` does. The path of every read: while a connection is free, it costs
        two calls.
        """
        slot = self.pool.take() or await self.acquire()
        try:
            answer = await query(slot.connection, *args, **kwargs)
        except BaseException as error:
            await self.recover(slot, error)
            raise
        self.pool.give_back(slot)
        return answer

    async def acquire(self) -> Slot:
        """For whom `pool.take` had no connection: one that comes back, or is opened, in time.

        It is to be given back to `pool`, or to `recover` by whom an error befell. Raises `PoolExhausted` when none is
        free in time, `Unavailable` when there is no server.
        """
        started = time.perf_counter()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._acquire_seconds):
                return await self.pool.acquire()
        except TimeoutError:
            if self.pool.is_exhausted:
                self._exhausted.inc()
                raise PoolExhausted("no database connection became free in time") from None
            raise Unavailable("the database does not answer") from None
        except (OSError, asyncpg.InterfaceError, *GONE) as error:
            raise Unavailable("the database is away") from error
        finally:
            self.waiting -= 1
            self._waits.observe(time.perf_counter() - started)

    async def ask_apart(self, sql: str) -> None:
        """Ask over a connection for this alone; raises what the driver does. The caller bounds it in time."""
        connection = await self.connect()
        try:
            await connection.execute(sql)
        finally:
            connection.terminate()

    async def recover(self, slot: Slot, error: BaseException) -> None:
        """Give back the connection on which `error` befell its user.

        Who is cancelled, or whose statement hangs, leaves at once; the connection is set right behind its back. So it
        is when the driver refused a call, which is how it says that another statement is still under way.
        """
        if isinstance(error, (TimeoutError, asyncio.CancelledError, GeneratorExit, asyncpg.InterfaceError)):
            self.pool.run_behind(self._set_right(slot))
        elif slot.is_open() and slot.connection.is_in_transaction():
            await asyncio.shield(self.pool.run_behind(self._set_right(slot)))
        else:
            self.pool.give_back(slot)

    async def _set_right(self, slot: Slot) -> None:
        """Undo what was begun and not committed. Where that is not to be had the connection is cut, and the server
        undoes it."""
        connection = slot.connection
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if connection.is_closed():
                    return
                if not connection.is_in_transaction():
                    await connection.execute("SELECT 1")  # after what was cancelled, which may be a BEGIN, has ended
                if connection.is_in_transaction():
                    await connection.execute("ROLLBACK")
        except BaseException as error:
            connection.terminate()
            if not isinstance(error, FAILURES):
                raise
        finally:
            self.pool.give_back(slot)

    async def close(self) -> None:
        """Close the pool; cut what does not come back soon, as behind a frozen server."""
        await self.pool.close(_CLOSE_SECONDS)
        for gauge in (SIZE, IN_USE, WAITING):
            metrics.child(gauge, *self._labels).set_function(lambda: 0)

    async def _open(self) -> Session:
        connection = await self.connect()
        try:
            _keep_alive(connection)
        except BaseException:
            connection.terminate()
            raise
        return Session(connection, self._statement_seconds)


def _keep_alive(connection: Any) -> None:
    """Notice within about 25 s that the peer is gone; the driver sets nothing and does not show its socket."""
    peer = connection._transport.get_extra_info("socket")
    if peer is not None and peer.family != socket.AF_UNIX:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
