import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import pytest

from shared import consistency
from shared.database import Connection, Database, Transaction
from shared.errors import Unavailable
from shared.group_commit import GroupCommit
from shared.health import Health
from shared.ids import new_id
from shared.settings import DataSettings
from shared.testing import eventually
from tests.integration.shared import things


@dataclass
class Things:
    """Inserts things by name, and says which it was asked to insert together and which are durable."""

    batches: list[list[str]] = field(default_factory=list)
    durable: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None
    away: bool = False

    def running(self, number: int) -> Callable[[], Awaitable[bool]]:
        async def are() -> bool:
            return len(self.batches) == number

        return are

    async def insert(self, tx: Transaction, new: Sequence[tuple[UUID, str]]) -> Sequence[str]:
        self.batches.append([name for _, name in new])
        if self.hold is not None:
            await self.hold.wait()
        if self.away:
            raise Unavailable
        await tx.executemany("INSERT INTO things (id, name) VALUES ($1, $2)", new)
        names = [name for _, name in new]
        tx.after_commit(lambda: self.durable.extend(names))
        return names


@pytest.fixture
async def db(data_settings: DataSettings, health: Health) -> AsyncIterator[Database]:
    async with Database.opened("things", data_settings, health, things.CONSTRAINTS) as opened:
        await things.create_table(opened)
        yield opened


@pytest.fixture
def made() -> Things:
    return Things()


@pytest.fixture
def writes(db: Database, made: Things) -> GroupCommit[tuple[UUID, str], str]:
    return GroupCommit(db, made.insert, key=lambda thing: thing[1])


async def names(connection: Connection) -> list[str]:
    return [row["name"] for row in await connection.fetch("SELECT name FROM things ORDER BY name")]


async def stored(db: Database) -> list[str]:
    async with db.transaction() as tx:
        return await names(tx)


async def test_writes_of_one_turn_are_one_transaction(
    db: Database, writes: GroupCommit[tuple[UUID, str], str], made: Things
) -> None:
    expected = [f"thing-{n:03}" for n in range(100)]
    assert await asyncio.gather(*(writes.write((new_id(), name)) for name in expected)) == expected
    assert await stored(db) == expected
    assert len(made.batches) == 1


async def test_one_that_fails_is_taken_out_alone(
    db: Database, writes: GroupCommit[tuple[UUID, str], str], made: Things
) -> None:
    await writes.write((new_id(), "taken"))
    outcomes = await asyncio.gather(
        *(writes.write((new_id(), name)) for name in ("a", "taken", "b")), return_exceptions=True
    )
    assert outcomes[0] == "a"
    assert isinstance(outcomes[1], things.NameTaken)
    assert outcomes[2] == "b"
    assert await stored(db) == ["a", "b", "taken"]
    assert made.durable == ["taken", "a", "b"], "each told of once, when it was durable"


async def test_two_writes_of_a_key_come_one_after_the_other(
    db: Database, writes: GroupCommit[tuple[UUID, str], str], made: Things
) -> None:
    outcomes = await asyncio.gather(
        *(writes.write((new_id(), name)) for name in ("a", "b", "a", "c")), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [str, str, things.NameTaken, str]
    assert made.batches == [["a", "b", "c"], ["a"]]


async def test_a_server_that_is_away_is_not_asked_for_each(
    writes: GroupCommit[tuple[UUID, str], str], made: Things
) -> None:
    made.away = True
    outcomes = await asyncio.gather(*(writes.write((new_id(), f"{n}")) for n in range(50)), return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert len(made.batches) == 1


async def test_who_goes_away_takes_only_its_own_write_along(
    db: Database, writes: GroupCommit[tuple[UUID, str], str], made: Things
) -> None:
    made.hold = asyncio.Event()
    begun = [asyncio.create_task(writes.write((new_id(), f"begun-{n}"))) for n in range(2)]
    await eventually(made.running(1))
    second = asyncio.create_task(writes.write((new_id(), "other")))
    await eventually(made.running(2))
    waiting = [asyncio.create_task(writes.write((new_id(), f"waiting-{n}"))) for n in range(2)]
    await asyncio.sleep(0)
    begun[0].cancel()
    waiting[0].cancel()
    made.hold.set()
    await asyncio.gather(*begun, second, *waiting, return_exceptions=True)
    assert await stored(db) == ["begun-0", "begun-1", "other", "waiting-1"]


async def test_each_caller_s_token_covers_its_write(db: Database, writes: GroupCommit[tuple[UUID, str], str]) -> None:
    async def write(n: int) -> tuple[UUID, str]:
        thing_id = new_id()
        with consistency.tracked(None) as positions:
            await writes.write((thing_id, f"thing-{n}"))
            return thing_id, positions.token()

    seen = []
    for thing_id, token in await asyncio.gather(*(write(n) for n in range(200))):
        with consistency.tracked(token):
            seen.append(await db.read(things.exists, thing_id))
    print(f"own writes not seen: {seen.count(False)} of 200")
    assert all(seen)


async def test_what_another_transaction_holds_fails_only_the_write_that_needs_it(
    db: Database, writes: GroupCommit[tuple[UUID, str], str]
) -> None:
    async with db.transaction() as tx:
        await things.insert(tx, new_id(), "held")
        outcomes = await asyncio.gather(
            *(writes.write((new_id(), name)) for name in ("a", "held", "z")), return_exceptions=True
        )
    assert (outcomes[0], outcomes[2]) == ("a", "z")
    assert isinstance(outcomes[1], Unavailable)
    assert await stored(db) == ["a", "held", "z"]
