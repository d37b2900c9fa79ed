import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from uuid import UUID

import asyncpg
import pytest

from shared import consistency
from shared.database import Connection, Database
from shared.errors import Conflict
from shared.health import Health
from shared.ids import new_id
from shared.loader import Loader
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import Backing
from tests.integration.shared import things


class Queries:
    """Names by id, and which batches of ids were asked for."""

    def __init__(self) -> None:
        self.batches: list[Sequence[UUID]] = []
        self.hold: asyncio.Event | None = None
        self.fails = False

    def running(self, number: int) -> Callable[[], Awaitable[bool]]:
        async def are() -> bool:
            return len(self.batches) == number

        return are

    async def names(self, connection: Connection, ids: Sequence[UUID]) -> Mapping[UUID, str]:
        self.batches.append(ids)
        if self.hold is not None:
            await self.hold.wait()
        if self.fails:
            raise Conflict
        rows = await connection.fetch("SELECT id, name FROM things WHERE id = ANY ($1::uuid[])", ids)
        return {row["id"]: row["name"] for row in rows}


@pytest.fixture
async def db(backing: Backing, data_settings: DataSettings, health: Health) -> AsyncIterator[Database]:
    async with Database.opened("things", data_settings, health, things.CONSTRAINTS) as opened:
        await things.create_table(opened)
        await backing.replicated()
        yield opened


@pytest.fixture
def queries() -> Queries:
    return Queries()


@pytest.fixture
async def ids(backing: Backing, db: Database) -> list[UUID]:
    made = [new_id() for _ in range(100)]
    async with db.transaction() as tx:
        for n, thing_id in enumerate(made):
            await things.insert(tx, thing_id, f"thing-{n}")
    await backing.replicated()
    return made


@pytest.fixture
def loader(db: Database, queries: Queries) -> Loader[UUID, str]:
    return Loader(db, queries.names)


async def test_reads_of_one_turn_are_one_query_and_each_gets_its_row(
    loader: Loader[UUID, str], queries: Queries, ids: list[UUID]
) -> None:
    assert await asyncio.gather(*(loader.get(i) for i in ids)) == [f"thing-{n}" for n in range(100)]
    assert await loader.get(ids[7]) == "thing-7"
    # Nobody was there when the first one asked.
    assert sorted(len(batch) for batch in queries.batches) == [1, 1, 99]


async def test_a_key_asked_for_twice_is_asked_once_and_what_is_not_there_is_none(
    loader: Loader[UUID, str], queries: Queries, ids: list[UUID]
) -> None:
    answers = await asyncio.gather(*(loader.get(i) for i in (ids[1], ids[0], ids[0], new_id())))
    assert answers == ["thing-1", "thing-0", "thing-0", None]
    assert sorted(len(batch) for batch in queries.batches) == [1, 2]


async def test_batches_are_bounded_and_so_is_their_number(
    loader: Loader[UUID, str], queries: Queries, ids: list[UUID]
) -> None:
    queries.hold = asyncio.Event()
    reads = [asyncio.create_task(loader.get(new_id())) for _ in range(1200)]
    await eventually(queries.running(2))
    reads += [asyncio.create_task(loader.get(i)) for i in ids]
    await asyncio.sleep(0)
    assert len(queries.batches) == 2
    queries.hold.set()
    assert (await asyncio.gather(*reads))[1200:] == [f"thing-{n}" for n in range(100)]
    assert sorted(len(batch) for batch in queries.batches) == [1, 299, 500, 500]


async def test_who_goes_away_leaves_the_others_their_rows(
    loader: Loader[UUID, str], queries: Queries, ids: list[UUID]
) -> None:
    queries.hold = asyncio.Event()
    reads = [asyncio.create_task(loader.get(i)) for i in ids]
    await eventually(queries.running(2))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await loader.get(ids[0])
    reads[0].cancel()  # who asked for itself
    reads[1].cancel()  # one of a batch
    queries.hold.set()
    answers = await asyncio.gather(*reads, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[:2])
    assert answers[2:] == [f"thing-{n}" for n in range(2, 100)]
    assert await loader.get(ids[0]) == "thing-0"


async def test_one_caller_s_mistake_fails_that_caller_alone(loader: Loader[UUID, str], ids: list[UUID]) -> None:
    wrong: UUID = "no id"  # type: ignore[assignment]
    good, bad, other = await asyncio.gather(
        loader.get(ids[1]), loader.get(wrong), loader.get(ids[2]), return_exceptions=True
    )
    assert (good, other) == ("thing-1", "thing-2")
    assert isinstance(bad, asyncpg.DataError)


async def test_an_error_that_is_no_key_s_is_everybody_s_and_not_asked_again(
    loader: Loader[UUID, str], queries: Queries, ids: list[UUID]
) -> None:
    queries.fails = True
    answers = await asyncio.gather(*(loader.get(i) for i in ids), return_exceptions=True)
    assert all(isinstance(answer, Conflict) for answer in answers)
    assert {len(batch) for batch in queries.batches} == {1, 99}, "no key was asked for by itself"


async def test_a_batch_is_as_new_as_its_most_demanding_caller_needs(
    backing: Backing, db: Database, loader: Loader[UUID, str], queries: Queries, ids: list[UUID]
) -> None:
    replicas = [await asyncpg.connect(url) for url in backing.replicas]
    try:
        for replica in replicas:
            await replica.execute("SELECT pg_wal_replay_pause()")
        stale = 0
        for n in range(50):
            written = new_id()

            async def writer(thing_id: UUID = written, n: int = n) -> str | None:
                with consistency.tracked(None):
                    async with db.transaction() as tx:
                        await things.insert(tx, thing_id, f"new-{n}")
                    others = [asyncio.create_task(loader.get(i), context=Context()) for i in ids]
                    mine = asyncio.create_task(loader.get(thing_id))
                    await asyncio.gather(*others)
                    return await mine

            stale += await writer() != f"new-{n}"
        print(f"stale own reads with paused replicas, in batches with others: {stale} of 50")
        assert stale == 0
        assert [len(batch) for batch in queries.batches if len(batch) > 1] == [100] * 50
    finally:
        for replica in replicas:
            await replica.execute("SELECT pg_wal_replay_resume()")
            await replica.close()
