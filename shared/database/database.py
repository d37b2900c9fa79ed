"""What callers use: transactions, reads, and the choice of the server that answers them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import asyncpg

from shared import budget, consistency, metrics
from shared.database.pool import FAILURES
from shared.database.primary import Primary
from shared.database.replica import Replica
from shared.database.server import GONE, PoolExhausted, Server
from shared.errors import Malformed, TenfoldError, Unavailable
from shared.health import Health
from shared.logs import get_logger
from shared.settings import DataSettings

Record = asyncpg.Record
P = ParamSpec("P")
T = TypeVar("T")

log = get_logger()

# How long a read may wait for one of the places that reads have on the primary when the replicas cannot answer.
_FALLBACK_SECONDS = 0.25
# The primary was shut down or demoted: the other pooled connections to it are of no use either.
_DEMOTED = (
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
)

# Those that may have a meaning to a caller.
_DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)

# target: primary, replica-N or none; reason: any (no token was needed), token (a replica has replayed it; on the
# primary: none has), no_replica (none is configured), replicas_out, shed.
READS = metrics.Counter("tenfold_database_reads_total", "Reads by target", ("service", "target", "reason"))


class Connection(Protocol):
    """What a query needs. `Transaction` is one; so is what `Database.read` hands out."""

    async def fetch(self, sql: str, *args: object) -> list[Record]: ...
    async def fetchrow(self, sql: str, *args: object) -> Record | None: ...
    async def fetchval(self, sql: str, *args: object) -> Any: ...
    async def execute(self, sql: str, *args: object) -> str: ...
    async def executemany(self, sql: str, rows: Sequence[Sequence[object]]) -> None: ...


class Cursor(Protocol):
    """What a statement found when it was opened, a part at a time, until its transaction ends."""

    async def fetch(self, number: int) -> list[Record]: ...


class Transaction:
    """A transaction in progress, on the primary. It commits when its block ends and rolls back when it raises."""

    def __init__(self, connection: Any) -> None:
        self._after_commit: list[Callable[[], object]] = []
        self.fetch = connection.fetch
        self.fetchrow = connection.fetchrow
        self.fetchval = connection.fetchval
        self.execute = connection.execute
        self.executemany = connection.executemany
        self.cursor: Callable[..., Awaitable[Cursor]] = connection.cursor

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the transaction is durable; not at all when it rolls back. It must not raise or wait."""
        self._after_commit.append(callback)

    def committed(self) -> None:
        for callback in self._after_commit:
            callback()

    def ended(self) -> None:
        """From here on the connection is somebody else's."""
        self.fetch = self.fetchrow = self.fetchval = self.execute = self.executemany = self.cursor = _refuse


async def _refuse(*_: object) -> NoReturn:
    raise RuntimeError("the transaction has ended")


class Database:
    """The primary, its replicas, and which of them may answer a read. Open it with `Database.opened`."""

    def __init__(
        self,
        service: str,
        primary: Primary,
        replicas: Sequence[Replica],
        constraints: Mapping[str, type[TenfoldError]],
        fallback: int,
    ) -> None:
        self.service = service
        self._primary = primary
        self._replicas = replicas
        self._constraints = constraints
        self._fallback = asyncio.Semaphore(fallback)
        self._turn = 0
        self._reads_without_replicas = metrics.child(READS, service, "primary", "no_replica")

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        service: str,
        settings: DataSettings,
        health: Health,
        constraints: Mapping[str, type[TenfoldError]] | None = None,
    ) -> "AsyncIterator[Database]":
        """`constraints` maps names of constraints to the error that a violation of them means.

        Raises `budget.DoesNotFit` when the server cannot have as many connections as are configured.
        """
        primary = Primary(service, settings)
        replicas = [Replica(n, url, service, settings, primary) for n, url in enumerate(settings.database_replica_urls)]
        # Reads that no replica can answer leave the other half of the primary's connections to the writes.
        db = cls(service, primary, replicas, constraints or {}, max(1, settings.database_pool_max // 2))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_close_all, (primary, *replicas))
            await db._check_budget(settings)
            if replicas or primary.has_several_hosts:
                watchers = [asyncio.create_task(work) for work in (primary.watch(), *(r.follow() for r in replicas))]
                stack.push_async_callback(_cancel_all, watchers)
            health.add(f"{service}-database", db.check)
            yield db

    @asynccontextmanager
    async def transaction(self, *, lock_seconds: float | None = None) -> AsyncIterator[Transaction]:
        """Run the block in one transaction on the primary; afterwards the caller's token covers its writes.

        `lock_seconds`: a statement that waits longer for what another transaction holds raises
        `asyncpg.LockNotAvailableError`.

        Raises `Unavailable` when no connection becomes free in time or the primary is away, and the error that
        `constraints` names when one is violated. When the connection is lost during the commit nobody knows whether it
        took place: that is `Unavailable` too.
        """
        try:
            slot = self._primary.pool.take() or await self._primary.acquire()
            connection = slot.connection
            tx = Transaction(connection)
            try:
                wait = "" if lock_seconds is None else f"; SET LOCAL lock_timeout = {int(lock_seconds * 1000)}"
                await connection.execute(f"BEGIN{wait}")
                yield tx
                # The server answers a COMMIT after a failed statement with a rollback, and no error.
                if await connection.execute("COMMIT") != "COMMIT":
                    raise RuntimeError("a statement failed in this transaction, and its error was not passed on")
                tx.committed()
                if consistency.is_tracked() and not await self._note_position(connection):
                    slot.outdated = True
            except BaseException as error:
                tx.ended()
                await self._primary.recover(slot, error)
                raise
            tx.ended()
            self._primary.pool.give_back(slot)
        except _DRIVER_ERRORS as error:
            self._raise_meaning(error)

    async def read(
        self, query: Callable[Concatenate[Connection, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `query(connection, *args)` where its answer is not older than what the caller wrote.

        A replica that fails is taken out and the read goes on elsewhere; so `query` must only read. Raises
        `Unavailable` when too many reads are on the primary already for want of replicas.
        """
        try:
            if self._replicas:
                return await self._read_somewhere(query, *args, **kwargs)
            self._reads_without_replicas.inc()
            return await self._primary.run(query, *args, **kwargs)
        except _DRIVER_ERRORS as error:
            self._raise_meaning(error)

    async def check(self) -> None:
        """Raise unless the primary answers; readiness asks. That all connections are in use says nothing against it."""
        try:
            if self._primary.pool.is_exhausted:
                await self._primary.ask_apart("SELECT 1")
            else:
                await self._primary.run(_ask, "SELECT 1")
        except _DRIVER_ERRORS as error:
            self._raise_meaning(error)

    async def _read_somewhere(
        self, query: Callable[Concatenate[Connection, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        positions = consistency.current()
        for replica in self._able(positions):
            reason = "any" if positions.get(replica.cluster) == consistency.ANY else "token"
            metrics.child(READS, self.service, replica.name, reason).inc()
            try:
                return await replica.run(query, *args, **kwargs)
            except PoolExhausted:
                raise
            except asyncpg.SerializationError:
                continue  # what it read was cleaned up on the primary; elsewhere it is not
            except (TimeoutError, Unavailable, *GONE) as error:
                if isinstance(error, TimeoutError) and replica.usable:
                    raise  # it answers its poller, so the query is slow, and would be on the primary too
                replica.take_out(type(error).__name__)
        for replica in self._replicas:
            replica.ask()
        reason = "token" if any(replica.usable for replica in self._replicas) else "replicas_out"
        async with self._place_on_primary():
            metrics.child(READS, self.service, "primary", reason).inc()
            return await self._primary.run(query, *args, **kwargs)

    def _able(self, positions: consistency.Positions) -> list[Replica]:
        """The replicas that may answer, the least busy first; those equally busy take turns."""
        able = [r for r in self._replicas if r.usable and r.position.reaches(positions.get(r.cluster))]
        if len(able) > 1:
            self._turn += 1
            turn = self._turn % len(able)
            able = sorted(able[turn:] + able[:turn], key=lambda r: r.pool.in_use + r.waiting)
        return able

    @asynccontextmanager
    async def _place_on_primary(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_FALLBACK_SECONDS):
                await self._fallback.acquire()
        except TimeoutError:
            metrics.child(READS, self.service, "none", "shed").inc()
            raise Unavailable("no replica can answer, and the primary has as many reads as it may have") from None
        try:
            yield
        finally:
            self._fallback.release()

    async def _note_position(self, connection: Any) -> bool:
        """False when the connection did not answer."""
        # After the commit, since its record is what a replica must have replayed. If the question fails the write still
        # stands, so the caller gets its answer, and a position that no replica reaches until it writes again.
        try:
            position, answered = await self._primary.note(connection), True
        except FAILURES:
            position, answered = self._primary.unreached(), False
        consistency.current().advance(self._primary.cluster, position)
        return answered

    async def _check_budget(self, settings: DataSettings) -> None:
        if settings.database_pgbouncer:
            return  # it is PgBouncer's to bound the server's connections
        try:
            allowed = int(await self._primary.run(_ask, "SHOW max_connections"))
        except (Unavailable, *FAILURES) as error:
            log.warning("connection_budget_unknown", database=self.service, error=type(error).__name__)
            return
        plan = budget.Plan(
            pools=settings.database_pools,
            pool=settings.database_pool_max,
            max_connections=allowed,
            reserve=settings.database_reserve,
        )
        log.info("connection_budget", database=self.service, fits=plan.fits, arithmetic=plan.arithmetic())
        plan.require()

    def _raise_meaning(self, error: Exception) -> NoReturn:
        """Driver errors become the caller's errors; what nobody foresaw passes on and ends as a 500."""
        if isinstance(error, asyncpg.IntegrityConstraintViolationError):
            if (named := self._constraints.get(error.constraint_name or "")) is not None:
                raise named from error
        elif isinstance(error, (TimeoutError, asyncpg.QueryCanceledError)):
            raise Unavailable("the database took too long") from error
        elif isinstance(error, (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)):
            raise Unavailable("another transaction was in the way") from error
        elif isinstance(error, asyncpg.CharacterNotInRepertoireError):
            raise Malformed("it holds a character that cannot be kept") from error
        # The driver has one class for misuse and for connections that closed under a statement.
        elif isinstance(error, GONE) or (isinstance(error, asyncpg.InterfaceError) and "clos" in str(error)):
            log.warning("database_away", database=self.service, error=type(error).__name__)
            if isinstance(error, _DEMOTED):
                self._primary.pool.expire()
            raise Unavailable("the database is away") from error
        raise error


async def _ask(connection: Any, sql: str) -> Any:
    return await connection.fetchval(sql)


async def _close_all(servers: Sequence[Server]) -> None:
    await asyncio.gather(*(server.close() for server in servers))


async def _cancel_all(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
