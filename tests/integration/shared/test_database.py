import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from shared import consistency
from shared.database import Connection, Database
from shared.errors import Malformed, Unavailable
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
        yield opened


async def reads_from_a_replica(db: Database) -> bool:
    return await db.read(things.where) == "replica"


async def test_reads_go_to_replicas_and_writes_to_the_primary(db: Database) -> None:
    await eventually(lambda: reads_from_a_replica(db))
    async with db.transaction() as tx:
        assert await things.where(tx) == "primary"


async def test_who_wrote_reads_the_write_wherever_it_is_read(db: Database) -> None:
    await eventually(lambda: reads_from_a_replica(db))
    token: str | None = None
    for n in range(200):
        thing_id = new_id()
        with consistency.tracked(token) as positions:
            async with db.transaction() as tx:
                await things.insert(tx, thing_id, f"thing-{n}")
            token = positions.token()
        with consistency.tracked(token):
            assert await db.read(things.exists, thing_id), f"write {n} was not seen"


@pytest.mark.parametrize("token", ["zzz-1-1", "garbage", "a-ffffffff-ffffffffffffffff", "-" * 500])
async def test_a_forged_token_costs_no_error(db: Database, token: str) -> None:
    with consistency.tracked(token):
        async with db.transaction() as tx:
            await things.insert(tx, new_id(), token[:50])
        assert await db.read(things.where) in ("primary", "replica")


async def test_a_violated_constraint_is_the_error_it_means(db: Database) -> None:
    async with db.transaction() as tx:
        await things.insert(tx, new_id(), "one")
    with pytest.raises(things.NameTaken):
        async with db.transaction() as tx:
            await things.insert(tx, new_id(), "one")


async def test_a_failed_block_leaves_nothing(db: Database) -> None:
    thing_id, called = new_id(), []
    with pytest.raises(RuntimeError):
        async with db.transaction() as tx:
            tx.after_commit(lambda: called.append(1))
            await things.insert(tx, thing_id, "gone")
            raise RuntimeError
    assert not await db.read(things.exists, thing_id)
    assert called == []


async def test_a_transaction_is_of_no_use_after_its_block(db: Database) -> None:
    async with db.transaction() as committed:
        pass
    with suppress(LookupError):
        async with db.transaction() as failed:
            raise LookupError
    for tx in (committed, failed):
        with pytest.raises(RuntimeError, match="has ended"):
            await tx.fetchval("SELECT 1")


async def test_who_leaves_a_statement_running_does_not_trouble_the_next(
    data_settings: DataSettings, health: Health
) -> None:
    async def two_at_once(connection: Connection) -> None:
        await asyncio.gather(connection.execute("SELECT pg_sleep(60)"), connection.execute("SELECT 1"))

    settings = msgspec.structs.replace(data_settings, database_replica_urls=(), database_pool_max=1)
    async with Database.opened("things", settings, health) as db:
        with pytest.raises(asyncpg.InterfaceError, match="in progress"):
            await db.read(two_at_once)
        assert await db.read(things.where) == "primary"


async def test_the_server_s_last_words_between_two_statements_are_its_failure(
    data_settings: DataSettings, health: Health
) -> None:
    """As those of one whose postmaster was killed: the driver does not expect them then."""
    words = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to unexpected postmaster exit\0\0"

    async def interrupted(connection: Any) -> None:
        driver = connection.close.__self__
        driver._protocol.data_received(b"E" + (4 + len(words)).to_bytes(4) + words)
        await connection.fetchval("SELECT 1")

    settings = msgspec.structs.replace(data_settings, database_replica_urls=(), database_pool_max=1)
    async with Database.opened("things", settings, health) as db:
        with pytest.raises(Unavailable, match="away"):
            await db.read(interrupted)
        assert await db.read(things.where) == "primary"


async def test_a_block_that_swallows_a_statement_s_error_does_not_pass_for_committed(db: Database) -> None:
    thing_id = new_id()
    with pytest.raises(RuntimeError, match="a statement failed"):
        async with db.transaction() as tx:
            await things.insert(tx, thing_id, "lost")
            with suppress(asyncpg.PostgresError):
                await tx.execute("SELECT 1 / 0")
    assert not await db.read(things.exists, thing_id)


async def test_a_long_statement_is_cut_off(data_settings: DataSettings, health: Health) -> None:
    settings = msgspec.structs.replace(data_settings, database_statement_seconds=0.2)
    async with Database.opened("things", settings, health) as db:
        with pytest.raises(Unavailable, match="too long"):
            async with db.transaction() as tx:
                await tx.execute("SELECT pg_sleep(5)")
        async with db.transaction() as tx:  # each has its own time
            for _ in range(3):
                await tx.execute("SELECT pg_sleep(0.1)")


async def test_a_role_cannot_read_another_s_schema(backing: Backing, db: Database, data_settings: DataSettings) -> None:
    async with backing.schema("users") as other:
        theirs = other.url.split("//")[1].split(":")[0]
        connection = await connect(data_settings.database_url)
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"SELECT id FROM {theirs}.accounts")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("CREATE TABLE public.mine (id int)")
        finally:
            await connection.close()


async def test_readiness_tells_when_the_database_is_away(data_settings: DataSettings, health: Health) -> None:
    nowhere = msgspec.structs.replace(
        data_settings, database_url="postgresql://x:x@127.0.0.1:1/x", database_replica_urls=()
    )
    async with Database.opened("things", nowhere, health):
        health.started()
        assert list(await health.faults()) == ["things-database"]


async def test_a_pool_that_is_in_use_does_not_make_a_process_unready(
    data_settings: DataSettings, health: Health
) -> None:
    settings = msgspec.structs.replace(data_settings, database_pool_max=2)
    async with Database.opened("things", settings, health) as db, AsyncExitStack() as stack:
        health.started()
        for _ in range(2):
            await stack.enter_async_context(db.transaction())
        assert await health.faults() == {}


async def test_transactions_in_each_other_s_way_are_for_the_caller_to_repeat(db: Database) -> None:
    one, two = new_id(), new_id()
    async with db.transaction() as tx:
        for thing_id in (one, two):
            await things.insert(tx, thing_id, str(thing_id))
    both = asyncio.Barrier(2)

    async def change(first: UUID, second: UUID) -> None:
        async with db.transaction() as tx:
            await tx.execute("UPDATE things SET number = 1 WHERE id = $1", first)
            await both.wait()
            await tx.execute("UPDATE things SET number = 1 WHERE id = $1", second)

    outcomes = await asyncio.gather(change(one, two), change(two, one), return_exceptions=True)
    assert sorted(map(str, outcomes)) == ["None", "another transaction was in the way"]
    assert any(isinstance(outcome, Unavailable) for outcome in outcomes)


async def test_a_text_that_the_server_cannot_keep_is_the_caller_s_fault(db: Database) -> None:
    with pytest.raises(Malformed):
        async with db.transaction() as tx:
            await things.insert(tx, new_id(), "a\0b")
