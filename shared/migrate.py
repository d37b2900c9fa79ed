"""Migrations: plain SQL files, forward only, applied in order, each in one transaction, under an advisory lock.

A file that is one `CREATE` or `DROP INDEX CONCURRENTLY` runs outside of one, as it must, on its own connection, which
should be a direct one. What an attempt that failed has left is removed before the next.

A service's schema gets the platform's own tables first (`shared/migrations`: outbox, inbox, ...), then the service's
(`services/<name>/migrations`). What was applied is kept with its checksum in `schema_migrations`; a file that changed
after it was applied is refused. Locks and statements are bounded, so a migration fails rather than stop the traffic:
who waits for a table makes everybody behind it wait too, so it waits briefly, steps back and tries again.

`python -m shared.migrate bootstrap ADMIN_URL` makes the roles and schemas: one of each a service, named for it.
"""

import asyncio
import hashlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from shared.logs import get_logger

log = get_logger()

PLATFORM = Path(__file__).parent / "migrations"
_LOCK = 0x74656E66  # any number, the same in every process; the lock is per schema by its second key
_CONNECT_SECONDS = 5.0
_OTHERS_SECONDS = 120.0
_ASK_SECONDS = 0.1
# For the transaction only, so that a pooler hands the connection on as it was.
_BOUNDS = "SET LOCAL transaction_timeout = 0; SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = '60s'"
_CONCURRENT = re.compile(r"^\s*(CREATE|DROP)\s.*\bINDEX CONCURRENTLY\b", re.IGNORECASE | re.MULTILINE)
_INVALID = """
    SELECT quote_ident(c.relname) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
     WHERE NOT i.indisvalid AND c.relnamespace = current_schema::regnamespace
"""
_STEP_BACK_SECONDS = 1.0
_TABLE = """
    CREATE TABLE IF NOT EXISTS schema_migrations (
        origin text NOT NULL, name text NOT NULL, checksum text NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (origin, name))
"""


class MigrationError(Exception):
    """The files and the schema do not fit; the message says how."""


@dataclass(frozen=True)
class Migration:
    origin: str
    name: str
    sql: str

    @property
    def concurrent(self) -> bool:
        return _CONCURRENT.search(self.sql) is not None

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def find(service: str, folder: Path) -> list[Migration]:
    """All migrations of a service in the order they are applied."""
    return [
        Migration(origin, path.stem, path.read_text())
        for origin, where in (("shared", PLATFORM), (service, folder))
        for path in sorted(where.glob("*.sql"))
    ]


def pending(migrations: list[Migration], applied: Mapping[tuple[str, str], str]) -> list[Migration]:
    """Those not yet applied. Raises `MigrationError` when an applied one has changed or a new one comes too late."""
    rest: list[Migration] = []
    for migration in migrations:
        checksum = applied.get((migration.origin, migration.name))
        if checksum is None:
            rest.append(migration)
        elif checksum != migration.checksum:
            raise MigrationError(f"{migration.origin}/{migration.name} was changed after it was applied")
        elif late := [m.name for m in rest if m.origin == migration.origin]:
            raise MigrationError(
                f"{migration.origin}/{late[0]} is older than {migration.name}, which is applied already"
            )
    return rest


async def migrate(url: str, service: str, folder: Path, *, attempts: int = 20) -> list[str]:
    """Bring the schema to the newest state; returns what was applied.

    A migration that does not get its locks is tried `attempts` times. Raises `MigrationError`, or what PostgreSQL says;
    the migrations before the failed one stay applied, of the failed one nothing stays.
    """
    connection = await _connect(url)
    try:
        applied = []
        for migration in find(service, folder):
            if await _patiently(url, connection, migration, service, folder, attempts):
                applied.append(f"{migration.origin}/{migration.name}")
                log.info("migration_applied", schema=service, migration=applied[-1])
        return applied
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


async def _patiently(
    url: str, connection: asyncpg.Connection, migration: Migration, service: str, folder: Path, attempts: int
) -> bool:
    for left in reversed(range(attempts)):
        try:
            return await _apply(url, connection, migration, find(service, folder))
        except asyncpg.LockNotAvailableError:
            if not left:
                raise
            log.warning("migration_waits_for_lock", schema=service, migration=migration.name, attempts_left=left)
            await asyncio.sleep(_STEP_BACK_SECONDS)
    raise ValueError("attempts must be at least 1")


async def _apply(url: str, connection: asyncpg.Connection, migration: Migration, known: list[Migration]) -> bool:
    """Whether it was this call that applied the migration."""
    async with _alone(connection):
        await connection.execute(_TABLE)
        if migration not in pending(known, await _applied(connection)):
            return False
        if migration.concurrent:
            # And the last statement before the wait: the portal of a query keeps a snapshot, which the build would wait
            # for.
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            await _apply_alone(url, migration)
        else:
            await connection.execute(migration.sql)
        await connection.execute(
            "INSERT INTO schema_migrations (origin, name, checksum) VALUES ($1, $2, $3)",
            migration.origin, migration.name, migration.checksum,
        )  # fmt: skip
        return True


@asynccontextmanager
async def _alone(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """A transaction with the lock of the schema, so that it also holds behind PgBouncer.

    Other migrators wait between transactions, then find the migration applied. A statement that waits for the lock
    would have a snapshot, for which an index that is built concurrently by who has the lock would wait in turn.
    """
    until = time.monotonic() + _OTHERS_SECONDS
    while time.monotonic() < until:
        async with connection.transaction():
            await connection.execute(_BOUNDS)
            if await connection.fetchval("SELECT pg_try_advisory_xact_lock($1, hashtext(current_schema))", _LOCK):
                yield
                return
        await asyncio.sleep(_ASK_SECONDS)
    raise MigrationError(f"another migrator has been at work for {_OTHERS_SECONDS:g} s")


async def _apply_alone(url: str, migration: Migration) -> None:
    """Takes as long as it takes: it blocks nobody. The lock that the caller holds keeps other migrators away."""
    connection = await _connect(url)
    try:
        await connection.execute("SET transaction_timeout = 0; SET statement_timeout = 0")
        for row in await connection.fetch(_INVALID):
            await connection.execute(f"DROP INDEX CONCURRENTLY {row[0]}")
        await connection.execute(migration.sql)
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


async def require_current(url: str, service: str, folder: Path) -> None:
    """Raise `MigrationError` when the schema is behind the code; a service asks before it starts."""
    connection = await _connect(url)
    try:
        known = await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
        missing = pending(find(service, folder), await _applied(connection) if known else {})
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)
    if missing:
        names = ", ".join(f"{m.origin}/{m.name}" for m in missing)
        raise MigrationError(
            f"the schema of {service} is behind by {len(missing)} migration(s): {names}; "
            f"run `python -m services.{service} migrate` first"
        )


async def _connect(url: str) -> asyncpg.Connection:
    # Prepared statements would outlive the transaction that a pooler lends the connection for.
    return await asyncpg.connect(url, timeout=_CONNECT_SECONDS, statement_cache_size=0)


async def _applied(connection: asyncpg.Connection) -> dict[tuple[str, str], str]:
    rows = await connection.fetch("SELECT origin, name, checksum FROM schema_migrations")
    return {(row["origin"], row["name"]): row["checksum"] for row in rows}


async def bootstrap(admin_url: str, passwords: Mapping[str, str]) -> None:
    """Make a role and a schema for each service in `passwords`, or bring them up to date. Needs a superuser.

    A role owns its schema and sees no other; its statements are bounded on the server's side, so that the bound holds
    behind a pooler and when the client is gone.
    """
    connection = await asyncpg.connect(admin_url, timeout=_CONNECT_SECONDS)
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1, 0)", _LOCK)
            database = await connection.fetchval("SELECT quote_ident(current_database())")
            await connection.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
            await connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
            for service, password in passwords.items():
                row = await connection.fetchrow(
                    "SELECT quote_ident($1), quote_literal($2), EXISTS (SELECT FROM pg_roles WHERE rolname = $1)",
                    service, password,
                )  # fmt: skip
                assert row is not None
                role, secret, exists = row
                await connection.execute(f"{'ALTER' if exists else 'CREATE'} ROLE {role} LOGIN PASSWORD {secret}")
                await connection.execute(f"GRANT CONNECT ON DATABASE {database} TO {role}")
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {role} AUTHORIZATION {role}")
                for setting in (
                    f"search_path = {role}",
                    "statement_timeout = '10s'",
                    "idle_in_transaction_session_timeout = '30s'",
                    # The other counts no client that stops within a statement's messages, with locks held.
                    "transaction_timeout = '45s'",
                ):
                    await connection.execute(f"ALTER ROLE {role} SET {setting}")
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


def main() -> None:
    match sys.argv[1:]:
        case ["bootstrap", url]:
            services = [name.strip() for name in os.environ.get("SERVICES", "").split(",") if name.strip()]
            missing = [
                f"{s.upper()}_DATABASE_PASSWORD: missing"
                for s in services
                if not os.environ.get(f"{s.upper()}_DATABASE_PASSWORD")
            ]
            if not services or missing:
                sys.exit("\n".join(missing) or "SERVICES: missing (for example SERVICES=users,media,notifier)")
            asyncio.run(bootstrap(url, {s: os.environ[f"{s.upper()}_DATABASE_PASSWORD"] for s in services}))
        case _:
            sys.exit("usage: python -m shared.migrate bootstrap ADMIN_URL")


if __name__ == "__main__":
    main()
