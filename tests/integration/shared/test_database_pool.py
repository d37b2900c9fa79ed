"""Connections: none is waited for without a bound, and all come back."""

import asyncio

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
        before = measured("tenfold_database_pool_exhausted_total")
        with pytest.raises(Unavailable, match="no database connection"):
            async with db.transaction():
                raise AssertionError("there is no second connection")
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
        print(f"\n{cancelled} requests cancelled, {db._primary.in_flight} connections missing")
        assert cancelled == 1000


async def _in_flight(db: Database, number: int) -> bool:
    return db._primary.in_flight == number


@pytest.mark.skipif(PGBOUNCER, reason="it is PgBouncer's to bound the server's connections")
async def test_a_configuration_that_cannot_fit_is_refused(alone: DataSettings, health: Health) -> None:
    settings = msgspec.structs.replace(alone, database_pools=1000)
    with pytest.raises(budget.DoesNotFit, match=r"1000 pools .* x 4 = 4000 > max_connections"):
        async with Database.opened("things", settings, health):
            pass
