"""Migrations on a real PostgreSQL: what they do, what they refuse, and that those who are served notice nothing."""

import asyncio
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import msgspec
import pytest

from services.users.app import SERVICE
from services.users.settings import Settings
from shared import migrate
from shared.database import Database
from shared.health import Health
from shared.migrate import MigrationError
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import PGBOUNCER, SERVICES, Backing, Schema, connect
from tests.serving import Api, serving

MIGRATED = sorted(path.parent.name for path in SERVICES.glob("*/migrations"))
ID = "0190b7a0-0000-7000-8000-000000000001"
# A row a table, as code of any version may have written them.
ROWS = {
    "outbox": "(shard, topic, event_id, type, source, key, data) VALUES (1, 't', '{id}', 'x.v1', 's', 'k', 'data')",
    "inbox": "(consumer, event_id) VALUES ('c', '{id}')",
    "dead_letters": "(consumer, event_id, type, reason, headers, data) VALUES ('c', '{id}', 'x.v1', 'r', '{{}}', '')",
    "idempotency_keys": "(principal, key, fingerprint, result) VALUES ('p', 'k', 'f', 'r')",
    "accounts": "(id, email, password_hash, display_name) VALUES ('{id}', 'a@example.org', 'h', 'Ann')",
    "sessions": "(id, account_id, device, address, expires_at) VALUES ('{id}', '{id}', 'd', 'a', 'tomorrow')",
    "blobs": "(id, doomed_at) VALUES ('{id}', now())",
    "media": "(id, owner_id, blob_id, content_type, bytes, sha256) VALUES ('{id}', '{id}', '{id}', 't', 1, 'x')",
    "usage": "(owner_id, bytes, items) VALUES ('{id}', 1, 1)",
    "recipients": "(user_id, email) VALUES ('{id}', 'a@example.org')",
    "notifications": "(id, user_id, category, title, body) VALUES ('{id}', '{id}', 'c', 't', 'b')",
    "emails": "(id, event_id, user_id, category, context, message_id)"
    " VALUES ('{id}', '{id}', '{id}', 'c', '{{}}', 'm')",
}


@pytest.fixture
async def empty(backing: Backing) -> AsyncIterator[Schema]:
    async with backing.schema("users", migrated=False) as fresh:
        yield fresh


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Migrations of a service that has one table."""
    write(tmp_path, "0001_create_things", "CREATE TABLE things (id int PRIMARY KEY); INSERT INTO things VALUES (1);")
    return tmp_path


def write(folder: Path, name: str, sql: str) -> None:
    (folder / f"{name}.sql").write_text(sql)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def tables(connection: asyncpg.Connection) -> set[str]:
    rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = current_schema")
    return {row["tablename"] for row in rows}


@pytest.mark.parametrize("service", MIGRATED)
async def test_empty_to_head(backing: Backing, service: str) -> None:
    folder = SERVICES / service / "migrations"
    async with backing.schema(service, migrated=False) as schema:
        with pytest.raises(MigrationError, match=f"python -m services.{service} migrate"):
            await migrate.require_current(schema.url, service, folder)
        applied = await migrate.migrate(schema.url, service, folder)
        assert applied == [f"{m.origin}/{m.name}" for m in migrate.find(service, folder)]
        await migrate.require_current(schema.url, service, folder)
        assert await migrate.migrate(schema.url, service, folder) == []


@pytest.mark.parametrize("service", MIGRATED)
async def test_previous_to_head_keeps_the_data(backing: Backing, service: str, tmp_path: Path) -> None:
    folder = SERVICES / service / "migrations"
    *before, last = sorted(folder.glob("*.sql"))
    for path in before:
        shutil.copy(path, tmp_path)
    async with backing.schema(service, migrated=False) as schema, connected(schema.url) as connection:
        await migrate.migrate(schema.url, service, tmp_path)
        there = await tables(connection)
        kept = [name for name in ROWS if name in there]
        for name in kept:
            await connection.execute(f"INSERT INTO {name} {ROWS[name].format(id=ID)}")
        rows = {name: dict(await connection.fetchrow(f"SELECT * FROM {name}") or {}) for name in kept}
        assert await migrate.migrate(schema.url, service, folder) == [f"{service}/{last.stem}"]
        await connection.reload_schema_state()
        for name in kept:
            now = dict(await connection.fetchrow(f"SELECT * FROM {name}") or {})
            assert now | rows[name] == now, name
    print(f"{service}: {last.stem} keeps a row in each of {', '.join(kept)}")


async def test_a_changed_file_is_refused(empty: Schema, folder: Path) -> None:
    await migrate.migrate(empty.url, "things", folder)
    write(folder, "0001_create_things", "CREATE TABLE things (id bigint PRIMARY KEY)")
    write(folder, "0002_more", "CREATE TABLE more (id int)")
    with pytest.raises(MigrationError, match="0001_create_things was changed"):
        await migrate.migrate(empty.url, "things", folder)
    with pytest.raises(MigrationError, match="0001_create_things was changed"):
        await migrate.require_current(empty.url, "things", folder)
    async with connected(empty.url) as connection:
        assert "more" not in await tables(connection)


async def test_a_file_that_comes_too_late_is_refused(empty: Schema, folder: Path) -> None:
    await migrate.migrate(empty.url, "things", folder)
    write(folder, "0000_late", "CREATE TABLE late (id int)")
    with pytest.raises(MigrationError, match="0000_late is older"):
        await migrate.migrate(empty.url, "things", folder)


async def test_migrators_at_once_apply_each_once(empty: Schema) -> None:
    folder = SERVICES / "users" / "migrations"
    applied = await asyncio.gather(*(migrate.migrate(empty.url, "users", folder) for _ in range(4)))
    expected = [f"{m.origin}/{m.name}" for m in migrate.find("users", folder)]
    assert sorted(name for names in applied for name in names) == sorted(expected)
    print(f"4 migrators at once: {len(expected)} migrations, applied {sum(map(len, applied))} times")


async def test_a_failed_migration_leaves_nothing(empty: Schema, folder: Path) -> None:
    write(folder, "0002_broken", "CREATE TABLE half (id int); DELETE FROM things; SELECT 1 / 0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate.migrate(empty.url, "things", folder)
    async with connected(empty.url) as connection:
        assert "half" not in await tables(connection)
        assert await connection.fetchval("SELECT count(*) FROM things") == 1
        assert await connection.fetchval("SELECT count(*) FROM schema_migrations WHERE name = '0002_broken'") == 0
    write(folder, "0002_broken", "CREATE TABLE half (id int)")  # it was not applied, so it may be mended
    assert await migrate.migrate(empty.url, "things", folder) == ["things/0002_broken"]


async def test_a_lock_is_waited_for_briefly_and_nothing_is_left(empty: Schema, folder: Path) -> None:
    await migrate.migrate(empty.url, "things", folder)
    write(folder, "0002_add_name", "CREATE TABLE half (id int); ALTER TABLE things ADD COLUMN name text")
    async with connected(empty.url) as holder, connected(empty.url) as reader:
        async with holder.transaction():
            await holder.fetch("SELECT id FROM things")
            started = time.monotonic()
            with pytest.raises(asyncpg.LockNotAvailableError):
                async with asyncio.timeout(30):
                    await migrate.migrate(empty.url, "things", folder, attempts=2)
            seconds = time.monotonic() - started
            assert await tables(holder) >= {"things"}
            assert "half" not in await tables(holder)
            waiting = asyncio.create_task(migrate.migrate(empty.url, "things", folder))
            # Readers that queue behind the waiting migration are served once it steps back.
            for _ in range(20):
                async with asyncio.timeout(10):
                    await reader.fetch("SELECT id FROM things")
        assert await waiting == ["things/0002_add_name"]
    print(
        f"a lock held by another: gave up after 2 attempts in {seconds:.1f} s, tables left 0; applied once it was free"
    )


async def test_a_setting_does_not_outlive_its_transaction(empty: Schema, folder: Path) -> None:
    """Behind PgBouncer the connection serves others next: what a migration sets is gone with its transaction."""
    async with connected(empty.url) as connection:
        ask = (
            "SELECT current_setting('lock_timeout'), current_setting('statement_timeout'),"
            " current_setting('transaction_timeout')"
        )
        before = await connection.fetchrow(ask)
        for migration in migrate.find("things", folder):
            await migrate._apply(empty.url, connection, migration, migrate.find("things", folder))
        assert await connection.fetchrow(ask) == before
        assert before is not None
        assert before[2] == "45s"  # as the role has it
        assert await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_an_index_is_built_while_the_table_is_written(empty: Schema, folder: Path) -> None:
    await migrate.migrate(empty.url, "things", folder)
    write(
        folder,
        "0002_index",
        "-- Found by id.\nCREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS things_twice ON things ((id % 2));",
    )
    async with connected(empty.url) as writer:
        await writer.execute("INSERT INTO things VALUES (3)")
        with pytest.raises(asyncpg.UniqueViolationError):
            await migrate.migrate(empty.url, "things", folder)
        assert await writer.fetchval("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 1
        await writer.execute("DELETE FROM things WHERE id = 3")
        async with writer.transaction():
            await writer.execute("INSERT INTO things VALUES (2)")
            building = asyncio.create_task(migrate.migrate(empty.url, "things", folder))
            await eventually(lambda: waits(empty.url, "INDEX CONCURRENTLY"))
        assert await building == ["things/0002_index"]
        assert await writer.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'things_twice'::regclass")
        assert await writer.fetchval("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0


async def waits(url: str, query: str) -> bool:
    """Whether a statement like this one waits for a lock."""
    async with connected(url) as connection:
        waiting: int = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE usename = current_user AND wait_event_type = 'Lock' AND query ~ $1",
            query,
        )
        return waiting > 0


async def test_a_service_does_not_start_on_a_schema_that_is_behind(empty: Schema) -> None:
    environment = {
        "DATABASE_URL": empty.url,
        "BUS": "inline",
        "SIGNING_KEY_SECRET": "s" * 32,
        "LINK_SECRET": "l" * 32,
        "PATH": os.defpath,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.users", "api", env=environment,
        cwd=SERVICES.parent, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 78
    assert b"the schema of users is behind by" in said
    assert b"run `python -m services.users migrate` first" in said


@pytest.fixture
async def api(data_settings: DataSettings) -> AsyncIterator[Api]:
    values = msgspec.structs.asdict(data_settings) | {
        "bus": "inline",
        "database_replica_urls": (),
        "signing_key_secret": "s" * 32,
        "link_secret": "l" * 32,
        "argon2_memory_kib": 8192,
        "argon2_time": 1,
    }
    async with serving(SERVICE, msgspec.convert(values, Settings)) as opened:
        yield opened


async def test_columns_are_added_under_load_without_a_failed_request(
    api: Api, data_settings: DataSettings, tmp_path: Path
) -> None:
    """Expand: what runs goes on with the columns it knows, on connections that have prepared their statements."""
    statuses: list[int] = []
    done = asyncio.Event()

    async def load(name: str) -> None:
        body = {"email": f"{name}@example.org", "password": "correct horse battery", "display_name": name}
        made = await api.post("/api/v1/users", body)
        statuses.append(made.status)
        token = (await api.post("/api/v1/sessions", {"email": body["email"], "password": body["password"]})).body
        number = 0
        while not done.is_set():
            number += 1
            more = {**body, "email": f"{name}-{number}@example.org"}
            answers = [
                await api.post("/api/v1/users", more),
                await api.get("/api/v1/users/me", token=token["access_token"]),
                await api.call("PATCH", "/api/v1/users/me", {"bio": f"{number}"}, token=token["access_token"]),
                await api.get(f"/api/v1/users/{made.body['id']}"),
            ]
            statuses.extend(answer.status for answer in answers)

    async def grown(by: int) -> None:
        wanted = len(statuses) + by

        async def reached() -> bool:
            return len(statuses) >= wanted

        await eventually(reached, within=60)

    for path in (SERVICES / "users" / "migrations").glob("*.sql"):
        shutil.copy(path, tmp_path)
    loads = [asyncio.create_task(load(f"ann{n}")) for n in range(4)]
    await grown(40)
    async with connected(data_settings.database_url) as holder:
        async with holder.transaction():  # a report that reads the table, longer than the migration waits for it
            await holder.fetch("SELECT id FROM accounts")
            write(tmp_path, "9001_add_nickname", "ALTER TABLE accounts ADD COLUMN nickname text NOT NULL DEFAULT ''")
            migrating = asyncio.create_task(migrate.migrate(data_settings.database_url, "users", tmp_path))
            await eventually(lambda: waits(data_settings.database_url, "^ALTER TABLE"))
            await grown(20)
        assert await migrating == ["users/9001_add_nickname"]
    await grown(40)
    write(tmp_path, "9002_add_motto", "ALTER TABLE accounts ADD COLUMN motto text")
    assert await migrate.migrate(data_settings.database_url, "users", tmp_path) == ["users/9002_add_motto"]
    await grown(40)
    done.set()
    await asyncio.gather(*loads)
    failed = [status for status in statuses if status >= 400]
    assert failed == []
    print(f"two columns added under {len(statuses)} requests, one of them behind a long transaction: failed 0")


@pytest.mark.skipif(PGBOUNCER, reason="nothing is prepared behind PgBouncer")
async def test_a_star_is_what_would_fail(data_settings: DataSettings) -> None:
    """The trap that named columns avoid: a prepared `SELECT *` in a transaction fails once when a column was added."""
    settings = msgspec.structs.replace(data_settings, database_replica_urls=(), database_pool_max=1)
    async with Database.opened("users", settings, Health()) as db, connected(data_settings.database_url) as other:
        for columns, falls in (("id", False), ("*", True)):
            ask = f"SELECT {columns} FROM accounts"
            async with db.transaction() as tx:
                await tx.fetch(ask)
            await other.execute(f"ALTER TABLE accounts ADD COLUMN added_{falls} text")
            failed = False
            try:
                async with db.transaction() as tx:
                    await tx.fetch(ask)
            except asyncpg.InvalidCachedStatementError:
                failed = True
            assert failed is falls


def test_no_query_of_ours_has_a_star() -> None:
    for path in [*SERVICES.glob("*/*.py"), *(SERVICES.parent / "shared").rglob("*.py")]:
        code = path.read_text()
        assert "SELECT *" not in code, path
        assert "RETURNING *" not in code, path
