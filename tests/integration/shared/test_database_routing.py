"""Which server answers a read."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import msgspec
import pytest

from shared import consistency
from shared.database import Connection, Database
from shared.errors import Unavailable
from shared.health import Health
from shared.ids import new_id
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import Backing, connect
from tests.integration.shared import things


@pytest.fixture
async def db(backing: Backing, data_settings: DataSettings, health: Health) -> AsyncIterator[Database]:
    async with Database.opened("things", data_settings, health, things.CONSTRAINTS) as opened:
        await things.create_table(opened)
        await backing.replicated()
        await eventually(lambda: usable(opened, len(backing.replicas)))
        yield opened


async def usable(db: Database, number: int) -> bool:
    return sum(replica.usable for replica in db._replicas) == number


@asynccontextmanager
async def cut_off(url: str, replica: str) -> AsyncIterator[None]:
    """The primary sends `replica` nothing: without its slot it is turned away."""
    primary = await connect(url)

    async def dropped() -> bool:
        await primary.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_replication WHERE application_name = $1", replica
        )
        try:
            await primary.execute("SELECT pg_drop_replication_slot($1)", replica)
        except asyncpg.ObjectInUseError:  # it was back before that
            return False
        return True

    try:
        await eventually(dropped, every=0.01)
        try:
            yield
        finally:
            await primary.execute("SELECT pg_create_physical_replication_slot($1, true)", replica)
    finally:
        await primary.close()


@asynccontextmanager
async def replay_paused(urls: list[str]) -> AsyncIterator[None]:
    replicas = [await asyncpg.connect(url) for url in urls]
    try:
        for replica in replicas:
            await replica.execute("SELECT pg_wal_replay_pause()")
        yield
    finally:
        for replica in replicas:
            await replica.execute("SELECT pg_wal_replay_resume()")
            await replica.close()


async def write(db: Database, token: str | None = None) -> tuple[UUID, str]:
    thing_id = new_id()
    with consistency.tracked(token) as positions:
        async with db.transaction() as tx:
            await things.insert(tx, thing_id, str(thing_id))
        return thing_id, positions.token()


async def own_reads_missed(db: Database, writes: int) -> int:
    """How many of so many writes their writer does not see in the read that follows."""
    missed = 0
    token: str | None = None
    for _ in range(writes):
        thing_id, token = await write(db, token)
        with consistency.tracked(token):
            missed += not await db.read(things.exists, thing_id)
    return missed


async def test_with_one_of_two_replicas_paused_nobody_misses_an_own_write(backing: Backing, db: Database) -> None:
    async with replay_paused(backing.replicas[:1]):
        missed = await own_reads_missed(db, 500)
    print(f"\nreplay paused on one of two replicas: {missed} of 500 own reads stale")
    assert missed == 0


async def test_the_measure_finds_a_router_that_looks_at_no_token(
    backing: Backing, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consistency.Position, "reaches", lambda *_: True)
    async with replay_paused(backing.replicas[:1]):
        assert await own_reads_missed(db, 50) > 0


async def test_a_process_that_never_wrote_honours_tokens(
    backing: Backing, db: Database, data_settings: DataSettings
) -> None:
    async with Database.opened("things", data_settings, Health()) as reader, replay_paused(backing.replicas):
        await eventually(lambda: usable(reader, 2))
        thing_id, token = await write(db)
        assert not await reader.read(things.exists, thing_id)
        with consistency.tracked(token):
            assert await reader.read(things.exists, thing_id)
            assert await reader.read(things.where) == "primary"


async def test_a_token_of_a_newer_timeline_is_not_served_by_a_replica_on_the_old_one(db: Database) -> None:
    _, token = await write(db)
    cluster, timeline, _ = token.split("-")
    with consistency.tracked(f"{cluster}-{int(timeline, 16) + 1:x}-0"):
        assert await db.read(things.where) == "primary"


async def test_a_lagging_replica_is_taken_out_and_let_in_again(
    backing: Backing, db: Database, data_settings: DataSettings
) -> None:
    settings = msgspec.structs.replace(data_settings, database_replica_max_lag_seconds=0.5)
    async with Database.opened("things", settings, Health()) as reader:
        await eventually(lambda: usable(reader, 2))
        async with replay_paused(backing.replicas[:1]):
            await write(db)
            await eventually(lambda: usable(reader, 1))
            assert not reader._replicas[0].usable
        await eventually(lambda: usable(reader, 2))


async def test_a_replica_that_lost_its_primary_counts_as_lagging(
    backing: Backing, db: Database, data_settings: DataSettings
) -> None:
    """It has replayed all it received, so it thinks itself up to date."""
    settings = msgspec.structs.replace(data_settings, database_replica_max_lag_seconds=0.5)
    async with Database.opened("things", settings, Health()) as reader:
        await eventually(lambda: usable(reader, 2))
        async with cut_off(backing.postgres, "replica_0"):
            await write(db)
            await eventually(lambda: usable(reader, 1))
            assert not reader._replicas[0].usable
        await eventually(lambda: usable(reader, 2))


async def test_reads_are_spread_and_avoid_the_busy_replica(db: Database) -> None:
    async def server(connection: Connection) -> str:
        return str(await connection.fetchval("SELECT format('%s:%s', inet_server_addr(), inet_server_port())"))

    async def busy(connection: Connection) -> None:
        await connection.execute("SELECT pg_sleep(3)")

    alone = Counter([await db.read(server) for _ in range(40)])
    assert sorted(alone.values()) == [20, 20]
    hogs = [asyncio.create_task(db._replicas[0].run(busy)) for _ in range(3)]
    await eventually(lambda: _in_flight(db, 3), every=0.002)
    beside = Counter([await db.read(server) for _ in range(40)])
    for hog in hogs:
        hog.cancel()
    await asyncio.gather(*hogs, return_exceptions=True)
    assert list(beside.values()) == [40]


async def _in_flight(db: Database, number: int) -> bool:
    return db._replicas[0].pool.in_use == number


@pytest.mark.parametrize("bounded", [True, False])
async def test_with_all_replicas_out_reads_leave_room_for_writes(
    backing: Backing, data_settings: DataSettings, bounded: bool
) -> None:
    async def slow(connection: Connection) -> None:
        await connection.execute("SELECT pg_sleep(0.5)")

    nowhere = ("postgresql://x:x@127.0.0.1:1/x",)
    settings = msgspec.structs.replace(
        data_settings, database_pool_max=4, database_replica_urls=nowhere, database_acquire_seconds=0.3
    )
    async with Database.opened("things", settings, Health()) as db:
        await things.create_table(db)
        if not bounded:
            db._fallback = asyncio.Semaphore(1000)
        readers = [asyncio.create_task(db.read(slow)) for _ in range(40)]
        failed = 0
        while not all(reader.done() for reader in readers):
            try:
                await write(db)
            except Unavailable:
                failed += 1
        results = await asyncio.gather(*readers, return_exceptions=True)
        shed = sum(isinstance(result, Unavailable) for result in results)
        print(f"\nall replicas out, {bounded=}: {shed} of 40 reads shed, {failed} writes failed")
        assert sum(result is None for result in results) + shed == 40
        assert (failed == 0) == bounded


async def test_a_read_on_a_replica_that_dies_goes_on_elsewhere(
    backing: Backing, db: Database, data_settings: DataSettings
) -> None:
    async def dies(connection: Connection) -> str:
        if await things.where(connection) == "replica":
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return await things.where(connection)

    assert await db.read(dies) == "primary"
    await eventually(lambda: usable(db, 2))


async def test_a_slow_query_is_not_tried_on_every_server(db: Database, data_settings: DataSettings) -> None:
    tried = 0

    async def slow(connection: Connection) -> None:
        nonlocal tried
        tried += 1
        await connection.execute("SELECT pg_sleep(5)")

    settings = msgspec.structs.replace(data_settings, database_statement_seconds=0.2)
    async with Database.opened("things", settings, Health()) as reader:
        await eventually(lambda: usable(reader, 2))
        with pytest.raises(Unavailable, match="too long"):
            await reader.read(slow)
    assert tried == 1
