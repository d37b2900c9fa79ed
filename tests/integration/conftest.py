from collections.abc import AsyncIterator

import pytest

from tests import sessions
from tests.backing import PGBOUNCER


@pytest.fixture(autouse=True)
async def no_session_state(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """Connections are not reset between two users, so no use may leave anything behind (docs/adr/0033).

    Whatever an integration test runs in this process is looked at. Behind PgBouncer a session is nobody's.
    """
    async with sessions.found_when_pools_close(monkeypatch) as found:
        yield found
    assert PGBOUNCER or not found
