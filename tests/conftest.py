"""What all tests share: real servers, started once a session when the first test asks for them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from shared.health import Health
from shared.redis import Redis
from shared.settings import DataSettings
from tests import backing as real
from tests.backing import Backing, Schema

_BROKER = pytest.StashKey[str]()


@pytest.fixture(scope="session")
async def backing(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> AsyncIterator[Backing]:
    async with real.opened(tmp_path_factory.mktemp("stack")) as opened:
        pytestconfig.stash[_BROKER] = opened.broker
        yield opened


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of `-n 2` tells the one that prints the summary."""
    told = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["broker"] = session.config.stash.get(_BROKER, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if broker := getattr(node, "workeroutput", {}).get("broker"):
        node.config.stash[_BROKER] = broker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (broker := config.stash.get(_BROKER, None)) is not None:
        terminalreporter.write_line(f"broker: {broker}")


@pytest.fixture
async def opened() -> AsyncIterator[AsyncExitStack]:
    """Closes what a test entered, in reverse order."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def schema(backing: Backing, request: pytest.FixtureRequest) -> AsyncIterator[Schema]:
    """A fresh schema of the service that the test's folder is named for; of users for the library's tests."""
    service = request.path.parent.name
    async with backing.schema(service if (real.SERVICES / service).is_dir() else "users") as fresh:
        yield fresh


@pytest.fixture
def data_settings(backing: Backing, schema: Schema) -> DataSettings:
    """Settings of a service on the backing servers, with a schema of its own."""
    return DataSettings(
        database_url=schema.url,
        database_replica_urls=schema.replica_urls,
        database_pgbouncer=real.PGBOUNCER,
        redis_url=backing.redis,
        kafka_bootstrap=(backing.kafka,),
        kafka_idempotence=backing.idempotent,
        kafka_session_timeout_seconds=6,
        drain_seconds=0,
    )


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
async def redis(backing: Backing) -> AsyncIterator[Redis]:
    async with Redis.opened(backing.redis) as opened:
        yield opened
