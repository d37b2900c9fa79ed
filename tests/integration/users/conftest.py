from collections.abc import AsyncIterator

import asyncpg
import msgspec
import pytest

from services.users.settings import Settings
from shared.settings import DataSettings
from tests.backing import Backing, connect
from tests.integration.users.people import Spy
from tests.serving import Api, serving


@pytest.fixture
def settings(data_settings: DataSettings) -> Settings:
    values = msgspec.structs.asdict(data_settings) | {
        "bus": "inline",
        "signing_key_secret": "s" * 32,
        "link_secret": "l" * 32,
        "argon2_memory_kib": 8192,
        "argon2_time": 1,
    }
    return msgspec.convert(values, Settings)


@pytest.fixture
def spy(settings: Settings) -> Spy:
    return Spy(settings)


@pytest.fixture
async def api(settings: Settings, spy: Spy, backing: Backing) -> AsyncIterator[Api]:
    await backing.replicated()
    async with serving(spy.service, settings) as opened:
        yield opened


@pytest.fixture
async def sql(settings: Settings) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await connect(settings.database_url)
    yield connection
    await connection.close()
