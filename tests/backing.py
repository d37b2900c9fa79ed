"""The real parts that tests run on: the embedded stack, or containers with `BACKING=containers`."""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from devstack.stack import Stack
from devstack.topology import Topology
from shared import migrate
from shared.testing import eventually

SERVICES = Path(__file__).parent.parent / "services"
# DATABASE=pgbouncer: services go through it; migrations and administration go to the server itself, as in production.
PGBOUNCER = os.environ.get("DATABASE") == "pgbouncer"


async def connect(url: str) -> "asyncpg.Connection[asyncpg.Record]":
    """A test's own connection. Behind PgBouncer each statement may meet another session, so none is prepared."""
    return await asyncpg.connect(url, statement_cache_size=0)


@dataclass(frozen=True)
class Backing:
    """Where the servers are. `broker` is `apache` or `tansu`; `stack` is there unless they run in containers."""

    postgres: str
    replicas: list[str]
    redis: str
    kafka: str
    broker: str
    mail: str
    smtp: str
    stack: Stack | None

    @property
    def idempotent(self) -> bool:
        """Whether the broker takes the idempotent producer."""
        return self.broker == "apache"

    async def replicated(self) -> None:
        """Return once the replicas have replayed what the primary has written up to now."""
        primary = await asyncpg.connect(self.postgres)
        replicas = [await asyncpg.connect(url) for url in self.replicas]
        try:
            written = await primary.fetchval("SELECT pg_current_wal_lsn()::text")

            async def caught_up() -> bool:
                found = [
                    await r.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", written) for r in replicas
                ]
                return all(found)

            await eventually(caught_up)
        finally:
            for connection in (primary, *replicas):
                await connection.close()

    @asynccontextmanager
    async def schema(self, service: str, *, migrated: bool = True) -> AsyncIterator["Schema"]:
        """A fresh schema for one test, with the migrations of `service` unless it is to be empty, and its role."""
        name = f"{service}_{secrets.token_hex(4)}"
        await migrate.bootstrap(self.postgres, {name: "test"})
        direct = Schema(_as_role(self.postgres, name), tuple(_as_role(url, name) for url in self.replicas))
        if migrated:
            await migrate.migrate(direct.url, service, SERVICES / service / "migrations")
        try:
            yield Schema(*self.stack.pooled_urls(name, "test")) if self.stack and PGBOUNCER else direct
        finally:
            admin = await asyncpg.connect(self.postgres)
            try:
                await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", name)
                await admin.execute(f"DROP OWNED BY {name} CASCADE")
                await admin.execute(f"DROP ROLE {name}")
            finally:
                await admin.close()


@dataclass(frozen=True)
class Schema:
    url: str
    replica_urls: tuple[str, ...]


def _as_role(url: str, role: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{role}:test@{parts.hostname}:{parts.port}"))


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Backing]:
    if os.environ.get("BACKING") == "containers":
        from tests.containers import started

        async with started() as backing:
            yield backing
        return
    topology = Topology.backing(replicas=2, pgbouncer=PGBOUNCER)
    async with Stack(topology, root=root, durable=False, keep_data=False) as stack:
        assert stack.urls.redis
        assert stack.urls.kafka
        assert stack.broker_kind
        yield Backing(
            postgres=stack.urls.postgres_primary,
            replicas=list(stack.urls.postgres_replicas),
            redis=stack.urls.redis,
            kafka=stack.urls.kafka,
            broker=stack.broker_kind,
            mail=stack.urls.mail,
            smtp=stack.urls.smtp,
            stack=stack,
        )
