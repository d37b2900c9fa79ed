"""No session state is used, so nothing need be reset. Every integration test is watched for it (`no_session_state`);
here is shown that the watch sees what there could be."""

import asyncpg
import pytest

from shared.database import Database
from shared.health import Health
from shared.settings import DataSettings
from tests import sessions
from tests.backing import PGBOUNCER, Backing

pytestmark = pytest.mark.skipif(PGBOUNCER, reason="a session is nobody's behind PgBouncer")


@pytest.mark.parametrize(
    ("statement", "left"),
    [
        ("SET work_mem = '5MB'", "setting work_mem"),
        ("SELECT pg_advisory_lock(77)", "lock 77"),
        ("LISTEN something", "channel something"),
        ("DECLARE hold CURSOR WITH HOLD FOR SELECT 1", "cursor hold"),
        ("PREPARE mine AS SELECT 1", "statement mine"),
        ("CREATE TEMP TABLE scratch (id int)", "table scratch"),
        ("SET LOCAL work_mem = '5MB'", None),
        ("SELECT pg_advisory_xact_lock(77)", None),
    ],
)
async def test_what_is_left_behind_is_found(backing: Backing, statement: str, left: str | None) -> None:
    connection = await asyncpg.connect(backing.postgres)
    try:
        async with connection.transaction():
            await connection.execute(statement)
        assert await sessions.left_behind(connection) == ([left] if left else [])
    finally:
        await connection.close()


async def test_a_connection_is_looked_at_when_its_pool_closes(
    data_settings: DataSettings, health: Health, no_session_state: list[str]
) -> None:
    async with Database.opened("things", data_settings, health) as db, db.transaction() as tx:
        await tx.execute("SET work_mem = '5MB'")
    assert no_session_state == ["setting work_mem"]
    no_session_state.clear()
