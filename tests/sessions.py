"""What a use of a pooled connection could leave behind for the next one, were it to."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest

from shared.database.pool import Pool

_LEFT = """
    SELECT 'setting ' || name FROM pg_settings WHERE source = 'session' AND setting <> reset_val
    UNION ALL SELECT 'lock ' || objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()
    UNION ALL SELECT 'channel ' || channel FROM pg_listening_channels() AS channel
    UNION ALL SELECT 'cursor ' || name FROM pg_cursors WHERE name <> ''
    UNION ALL SELECT 'statement ' || name FROM pg_prepared_statements WHERE name !~ '^__asyncpg_'
    UNION ALL SELECT 'table ' || relname FROM pg_class WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r'
"""


async def left_behind(connection: Any) -> list[str]:
    """The session state of `connection`; what the driver keeps for itself does not count."""
    return [str(row[0]) for row in await connection.fetch(_LEFT)]


@asynccontextmanager
async def found_when_pools_close(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """What is left on the connections of every pool that is closed meanwhile."""
    found: list[str] = []
    close = Pool.close

    async def look_and_close(pool: Pool, seconds: float) -> None:
        for slot in pool._free:
            if slot.is_open():
                with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    found.extend(await left_behind(slot.connection))
        await close(pool, seconds)

    monkeypatch.setattr(Pool, "close", look_and_close)
    yield found
