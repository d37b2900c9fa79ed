"""PostgreSQL: transactions on the primary, reads on a replica that has seen what the caller wrote.

`async with db.transaction() as tx:` goes to the primary. `await db.read(query, ...)` calls `query(connection, ...)` on
a replica that has itself replayed the caller's consistency token, else on the primary. Queries are plain functions of a
`Connection`, so the same one serves both.

Nothing waits without a bound: connecting, getting a connection from the pool, each statement, and closing. No session
state is relied on, so PgBouncer in transaction mode may stand between.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import asyncpg

from shared import consistency, metrics
from shared.errors import TenfoldError, Unavailable
from shared.health import Health
from shared.logs import get_logger
from shared.settings import DataSettings

__all__ = ["Connection", "Database", "Record", "Transaction"]

Record = asyncpg.Record
P = ParamSpec("P")
T = TypeVar("T")

log = get_logger()

_CLOSE_SECONDS = 3.0
_POLL_SECONDS = 0.25
_CONNECT_SECONDS = 3.0
_IDLE_SECONDS = 60.0
# Past every real position: reads go to the primary until a later write says where they may go again.
_NEVER = 2**63
# A connection or server that is gone, or a primary that was demoted: another attempt finds another connection.
_GONE = (
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.TooManyConnectionsError,
)

READS = metrics.Counter("tenfold_database_reads_total", "Reads by target", ("service", "target"))
LAG = metrics.Gauge("tenfold_database_replica_lag_seconds", "Replay lag of a replica", ("service", "replica"))
ACQUIRE = metrics.Histogram("tenfold_database_acquire_seconds", "Wait for a pooled connection", ("service", "target"))


class Connection(Protocol):
    """What a query needs. `Transaction` is one; so is what `Database.read` hands out."""

    async def fetch(self, sql: str, *args: object) -> list[Record]: ...
    async def fetchrow(self, sql: str, *args: object) -> Record | None: ...
    async def fetchval(self, sql: str, *args: object) -> Any: ...
    async def execute(self, sql: str, *args: object) -> str: ...
    async def executemany(self, sql: str, rows: Sequence[Sequence[object]]) -> None: ...


class Transaction:
    """A transaction in progress, on the primary. It commits when its block ends and rolls back when it raises."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._after_commit: list[Callable[[], object]] = []
        self.fetch = connection.fetch
        self.fetchrow = connection.fetchrow
        self.fetchval = connection.fetchval
        self.execute = connection.execute
        self.executemany = connection.executemany

    def savepoint(self) -> Any:
        """`async with tx.savepoint():` undoes only its own block when that raises."""
        return self._connection.transaction()

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the transaction is durable; not at all when it rolls back. It must not raise or wait."""
        self._after_commit.append(callback)

    def committed(self) -> None:
        for callback in self._after_commit:
            callback()


class _Server:
    """One PostgreSQL server and the pool to it. A replica's position is kept fresh by `follow`."""

    def __init__(self, name: str, service: str, pool: "asyncpg.Pool[Record]", acquire_seconds: float) -> None:
        self.name = name
        self.replayed = 0
        self.lag = 0.0
        self.usable = False
        self.in_flight = 0
        self.pool = pool
        self._acquire_seconds = acquire_seconds
        self._reads = metrics.child(READS, service, name)
        self._waits = metrics.child(ACQUIRE, service, name)
        self._lag_gauge = metrics.child(LAG, service, name)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        started = time.perf_counter()
        try:
            acquired = await self.pool.acquire(timeout=self._acquire_seconds)
        except TimeoutError:
            raise Unavailable("no database connection became free in time") from None
        except (OSError, asyncpg.InterfaceError, *_GONE) as error:
            raise Unavailable("the database is away") from error
        self._waits.observe(time.perf_counter() - started)
        self.in_flight += 1
        try:
            yield acquired
        finally:
            self.in_flight -= 1
            await self._release(acquired)

    async def _release(self, connection: Any) -> None:
        # Shielded: a caller cancelled here must not leave the connection in limbo. Bounded: the server may hang.
        with suppress(TimeoutError, asyncpg.InterfaceError, *_GONE):
            await asyncio.shield(self.pool.release(connection, timeout=_CLOSE_SECONDS))

    async def read(self, query: Callable[Concatenate[Connection, P], Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        async with self.connection() as connection:
            self._reads.inc()
            return await query(connection, *args, **kwargs)

    async def follow(self, max_lag: float) -> None:
        """Keep `replayed` and `usable` fresh, for ever."""
        while True:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS), self.connection() as connection:
                    row = await connection.fetchrow(_REPLICA_STATE)
                self.replayed = _lsn(row["replayed"])
                self.lag = float(row["lag"])
                self._lag_gauge.set(self.lag)
                self._set_usable(self.lag <= max_lag)
            except (TimeoutError, TypeError, Unavailable, asyncpg.PostgresError, asyncpg.InterfaceError):
                # TypeError: no row, for what was a replica is one no more.
                self._set_usable(False)
            await asyncio.sleep(_POLL_SECONDS)

    def _set_usable(self, usable: bool) -> None:
        if usable != self.usable:
            log.info("replica_in" if usable else "replica_out", replica=self.name, lag=self.lag)
        self.usable = usable

    async def close(self) -> None:
        # close() can hang behind a frozen server: give up after a while and cut.
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.pool.close()
        except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self.pool.terminate()


# A replica that has replayed all it received is not behind, however long ago the last transaction was.
_REPLICA_STATE = """
    SELECT pg_last_wal_replay_lsn()::text AS replayed,
           CASE WHEN pg_last_wal_replay_lsn() = pg_last_wal_receive_lsn() THEN 0
                ELSE coalesce(extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()), 0)
           END AS lag
     WHERE pg_is_in_recovery()
"""


class Database:
    """The primary, its replicas, and which of them may answer a read. Open it with `Database.opened`."""

    def __init__(
        self, service: str, primary: _Server, replicas: Sequence[_Server], constraints: Mapping[str, type[TenfoldError]]
    ) -> None:
        self.service = service
        self._primary = primary
        self._replicas = replicas
        self._constraints = constraints
        self._cluster = ""

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        service: str,
        settings: DataSettings,
        health: Health,
        constraints: Mapping[str, type[TenfoldError]] | None = None,
    ) -> "AsyncIterator[Database]":
        """`constraints` maps names of constraints to the error that a violation of them means."""
        primary = _Server(
            "primary", service, await _pool(service, settings.database_url, settings), settings.database_acquire_seconds
        )
        replicas = [
            _Server(f"replica-{n}", service, await _pool(service, url, settings), settings.database_acquire_seconds)
            for n, url in enumerate(settings.database_replica_urls)
        ]
        db = cls(service, primary, replicas, constraints or {})
        health.add(f"{service}-database", db.check)
        pollers = [asyncio.create_task(r.follow(settings.database_replica_max_lag_seconds)) for r in replicas]
        try:
            yield db
        finally:
            for poller in pollers:
                poller.cancel()
            await asyncio.gather(*pollers, return_exceptions=True)
            await asyncio.gather(*(server.close() for server in (primary, *replicas)))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Run the block in one transaction on the primary; afterwards the caller's token covers its writes.

        Raises `Unavailable` when no connection becomes free in time or the primary is away, and the error that
        `constraints` names when one is violated.
        """
        async with self._translated(), self._primary.connection() as connection:
            async with connection.transaction():
                tx = Transaction(connection)
                yield tx
            tx.committed()
            if consistency.is_tracked():
                await self._note_position(connection)

    async def read(
        self, query: Callable[Concatenate[Connection, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `query(connection, *args)` where its answer is not older than what the caller wrote.

        A replica that fails is taken out and the read goes on elsewhere; so `query` must only read.
        """
        async with self._translated():
            needed = consistency.current().get(self._cluster) if self._cluster else 0
            candidates = [r for r in self._replicas if r.usable and r.replayed >= needed]
            for replica in sorted(candidates, key=lambda r: r.in_flight):
                try:
                    return await replica.read(query, *args, **kwargs)
                except (TimeoutError, Unavailable, *_GONE):
                    replica.usable = False
            return await self._primary.read(query, *args, **kwargs)

    async def check(self) -> None:
        """Raise unless the primary answers; readiness asks."""
        async with self._translated(), self._primary.connection() as connection:
            await connection.fetchval("SELECT 1")

    async def _note_position(self, connection: Any) -> None:
        # After the commit, since its record is what a replica must have replayed. If the question fails the write still
        # stands, so the caller gets its answer, and a position that no replica reaches until it reads from the primary.
        try:
            if not self._cluster:
                number = await connection.fetchval("SELECT system_identifier FROM pg_control_system()")
                self._cluster = _base36(number)
            lsn = _lsn(await connection.fetchval("SELECT pg_current_wal_insert_lsn()::text"))
        except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            lsn = _NEVER
        if self._cluster:
            consistency.current().advance(self._cluster, lsn)

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        """Driver errors become the caller's errors; what nobody foresaw passes on and ends as a 500."""
        try:
            yield
        except asyncpg.IntegrityConstraintViolationError as error:
            named = self._constraints.get(error.constraint_name or "")
            if named is None:
                raise
            raise named from error
        except (TimeoutError, asyncpg.QueryCanceledError) as error:
            raise Unavailable("the database took too long") from error
        except (asyncpg.InterfaceError, *_GONE) as error:
            # The driver has one class for misuse and for connections that closed under a statement.
            if isinstance(error, asyncpg.InterfaceError) and "clos" not in str(error):
                raise
            log.warning("database_away", database=self.service, error=type(error).__name__)
            await self._primary.pool.expire_connections()
            raise Unavailable("the database is away") from error


async def _pool(service: str, url: str, settings: DataSettings) -> "asyncpg.Pool[Record]":
    return await asyncpg.create_pool(
        url,
        min_size=0,
        max_size=settings.database_pool_max,
        timeout=_CONNECT_SECONDS,
        command_timeout=settings.database_statement_seconds,
        max_inactive_connection_lifetime=_IDLE_SECONDS,
        statement_cache_size=0 if settings.database_pgbouncer else 100,
        server_settings={} if settings.database_pgbouncer else {"application_name": f"tenfold-{service}"},
        init=_keepalive,
        reset=_no_reset,
    )


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


def _lsn(text: str) -> int:
    """`16/B374D848` as a number."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def _base36(number: int) -> str:
    digits = ""
    number &= 2**64 - 1
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"
