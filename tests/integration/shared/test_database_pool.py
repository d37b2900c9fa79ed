"""Connections: none is waited for without a bound, and all come back."""

import asyncio
import time
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY

from shared import budget
from shared.database import Connection, Database
from shared.errors import Unavailable
from shared.health import Health
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import PGBOUNCER
from tests.integration.shared import things


@pytest.fixture
def alone(data_settings: DataSettings) -> DataSettings:
    return msgspec.structs.replace(data_settings, database_replica_urls=(), database_pool_max=4)


async def slow(connection: Connection) -> None:
    await connection.execute("SELECT pg_sleep(5)")


def measured(name: str) -> float:
    value = [
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name and sample.labels == {"service": "things", "target": "primary"}
    ]
    return value[0]


async def test_an_exhausted_pool_answers_within_its_time(alone: DataSettings, health: Health) -> None:
    settings = msgspec.structs.replace(alone, database_pool_max=1, database_acquire_seconds=0.2)
    async with Database.opened("things", settings, health) as db, db.transaction():
        before, began = measured("tenfold_database_pool_exhausted_total"), time.monotonic()
        with pytest.raises(Unavailable, match="no database connection"):
            async with db.transaction():
                raise AssertionError("there is no second connection")
        print(f"\npool exhausted: 503 after {time.monotonic() - began:.2f} s with an acquire timeout of 0.2 s")
        assert measured("tenfold_database_pool_exhausted_total") == before + 1


async def test_the_pool_is_measured(alone: DataSettings, health: Health) -> None:
    async with Database.opened("things", alone, health) as db:
        running = [asyncio.create_task(db.read(slow)) for _ in range(6)]
        await eventually(lambda: _in_flight(db, 4), every=0.002)
        assert measured("tenfold_database_pool_connections") == 4
        assert measured("tenfold_database_pool_in_use") == 4
        assert measured("tenfold_database_pool_waiting") == 2
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    assert measured("tenfold_database_pool_connections") == 0


async def test_a_thousand_cancelled_requests_give_their_connections_back(alone: DataSettings, health: Health) -> None:
    cancelled = 0

    async def write(db: Database) -> None:
        async with db.transaction() as tx:
            await slow(tx)

    async with Database.opened("things", alone, health) as db:
        for n in range(250):
            running = [asyncio.create_task(db.read(slow) if n % 2 else write(db)) for _ in range(4)]
            await eventually(lambda: _in_flight(db, 4), every=0.001)
            if n % 3 == 0:
                await asyncio.sleep(0)  # some before they have begun, some within their statement
            for task in running:
                task.cancel()
            results = await asyncio.gather(*running, return_exceptions=True)
            cancelled += sum(isinstance(result, asyncio.CancelledError) for result in results)
        await eventually(lambda: _in_flight(db, 0))
        assert await asyncio.gather(*(db.read(things.where) for _ in range(8))) == ["primary"] * 8
        print(f"\n{cancelled} requests cancelled, {db._primary.pool.in_use} connections missing")
        assert cancelled == 1000


async def test_a_turn_that_comes_as_its_caller_is_cancelled_goes_to_the_next(
    alone: DataSettings, health: Health
) -> None:
    settings = msgspec.structs.replace(alone, database_pool_max=1)
    async with Database.opened("things", settings, health) as db:
        pool = db._primary.pool
        slot = await pool.acquire()
        first, second = asyncio.create_task(pool.acquire()), asyncio.create_task(pool.acquire())
        await asyncio.sleep(0)
        pool.give_back(slot)
        first.cancel()
        assert await second is slot
        assert first.cancelled()
        pool.give_back(slot)


async def backend(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT pg_backend_pid()"))


async def test_replaced_connections_are_closed_before_others_are_opened(alone: DataSettings, health: Health) -> None:
    settings = msgspec.structs.replace(alone, database_pool_max=1)
    async with Database.opened("things", settings, health) as db:
        pool, open_another = db._primary.pool, db._primary.pool._connect
        opened: list[Any] = []

        async def connect() -> Any:
            assert all(connection.is_closed() for connection in opened)
            opened.append(await open_another())
            return opened[-1]

        pool._connect = connect
        pool.expire()
        for _ in range(20):
            async with db.transaction() as tx:
                await things.where(tx)
                pool.expire()  # while it is in use
            await db.read(things.where)
            pool.expire()  # while it is free
        assert len(opened) == 40


@pytest.mark.skipif(PGBOUNCER, reason="its connections are others")
async def test_a_connection_that_comes_back_in_a_transaction_is_not_used_again(
    alone: DataSettings, health: Health
) -> None:
    async def leave_open(connection: Connection) -> int:
        await connection.execute("BEGIN")
        return await backend(connection)

    settings = msgspec.structs.replace(alone, database_pool_max=1)
    async with Database.opened("things", settings, health) as db:
        assert await db.read(leave_open) != await db.read(backend) == await db.read(backend)


async def test_what_is_not_used_is_closed(alone: DataSettings, health: Health) -> None:
    async with Database.opened("things", alone, health) as db:
        pool = db._primary.pool
        await asyncio.gather(*(db.read(things.where) for _ in range(4)))
        before = pool.size
        pool._close_unused()
        assert pool.size == before, "all were used since it looked last"
        await db.read(things.where)
        pool._close_unused()
        await eventually(lambda: _open(db, 1))
        assert await db.read(things.where) == "primary"


async def _open(db: Database, number: int) -> bool:
    return db._primary.pool.size == number


async def _in_flight(db: Database, number: int) -> bool:
    return db._primary.pool.in_use == number


@pytest.mark.skipif(PGBOUNCER, reason="it is PgBouncer's to bound the server's connections")
async def test_a_configuration_that_cannot_fit_is_refused(alone: DataSettings, health: Health) -> None:
    settings = msgspec.structs.replace(alone, database_pools=1000)
    with pytest.raises(budget.DoesNotFit, match=r"1000 pools .* x 4 = 4000 > max_connections"):
        async with Database.opened("things", settings, health):
            pass
