"""An invalidation that was lost after the commit is made up for."""

import secrets
from collections.abc import AsyncIterator

import msgspec
import pytest

from shared import consistency
from shared.cache import Cache, heal
from shared.consistency import ANY
from shared.database import Database
from shared.health import Health
from shared.redis import Redis
from shared.settings import DataSettings


class Row(msgspec.Struct, frozen=True):
    name: str
    version: int


class Table:
    """One row, and what its loads were told to heed."""

    def __init__(self) -> None:
        self.row = Row("old", 1)
        self.heeded: list[bool] = []

    async def load(self) -> Row:
        positions = consistency.current()
        self.heeded.append(any(positions.get(c) != ANY for c in positions._positions))
        return self.row


@pytest.fixture
async def db(data_settings: DataSettings, health: Health) -> AsyncIterator[Database]:
    settings = msgspec.structs.replace(data_settings, database_replica_urls=())
    async with Database.opened("things", settings, health) as opened:
        yield opened


@pytest.fixture
def name() -> str:
    return f"rows-{secrets.token_hex(4)}"


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def cache(name: str, redis: Redis) -> Cache[Row]:
    return Cache(name, Row, lambda row: row.version, redis)


@pytest.fixture
async def stale(db: Database, name: str, cache: Cache[Row], table: Table, dead_redis: Redis) -> Cache[Row]:
    """The cache after a write whose invalidation was lost: others go on to see what was before."""
    await cache.get("k", table.load)
    cut_off = Cache(name, Row, lambda row: row.version, dead_redis)
    async with db.transaction() as tx:
        await cut_off.note(tx, "k", 2)
    table.row = Row("new", 2)
    await cut_off.invalidate("k", 2)
    assert await cache.get("k", table.load) == Row("old", 1)
    return cache


async def notes(db: Database) -> int:
    async with db.transaction() as tx:
        return int(await tx.fetchval("SELECT count(*) FROM cache_notes"))


async def test_a_lost_invalidation_is_made_up_for(db: Database, redis: Redis, stale: Cache[Row], table: Table) -> None:
    assert await heal(db, redis) == 1
    assert await stale.get("k", table.load) == Row("new", 2)
    assert table.heeded == [False, True], "and loaded from where the write is"
    assert await notes(db) == 0
    assert await heal(db, redis) == 0


async def test_what_redis_does_not_take_stays_noted(
    db: Database, redis: Redis, dead_redis: Redis, stale: Cache[Row], table: Table
) -> None:
    assert await heal(db, dead_redis) == 0
    assert await heal(db, redis) == 1
    assert await stale.get("k", table.load) == Row("new", 2)


async def test_notes_do_not_outlive_what_they_are_about(db: Database, dead_redis: Redis, stale: Cache[Row]) -> None:
    async with db.transaction() as tx:
        assert 660 < await tx.fetchval("SELECT extract(epoch FROM moot_at - now()) FROM cache_notes") <= 666
        await tx.execute("UPDATE cache_notes SET moot_at = now() - interval '1 second'")
    assert await heal(db, dead_redis) == 1
    assert await notes(db) == 0


async def test_a_write_that_rolls_back_leaves_no_note(db: Database, cache: Cache[Row]) -> None:
    with pytest.raises(RuntimeError):
        async with db.transaction() as tx:
            await cache.note(tx, "k", 2)
            raise RuntimeError
    assert await notes(db) == 0


async def test_healing_again_costs_nobody_a_fresh_entry(db: Database, redis: Redis, cache: Cache[Row]) -> None:
    table = Table()
    table.row = Row("new", 2)
    async with db.transaction() as tx:
        await cache.note(tx, "k", 2)
    await cache.invalidate("k", 2)
    await cache.get("k", table.load)
    assert await heal(db, redis) == 1
    await cache.get("k", table.load)
    assert len(table.heeded) == 1
