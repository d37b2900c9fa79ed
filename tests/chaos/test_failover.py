"""The primary hangs, dies, and is replaced, while a service writes. Each test has servers of its own."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest

from devstack.stack import Stack
from devstack.topology import Topology
from shared import consistency, migrate
from shared.database import Database
from shared.errors import Unavailable
from shared.health import Health
from shared.ids import new_id
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import SERVICES
from tests.integration.shared import things

ROLE = "users"


@asynccontextmanager
async def started(root: Path, *, synchronous: bool, replicas: int = 2) -> AsyncIterator[Stack]:
    topology = Topology.backing(replicas=replicas, redis=0, broker="none", synchronous=synchronous)
    async with Stack(topology, root=root, durable=False, keep_data=False) as stack:
        await migrate.bootstrap(stack.urls.postgres_primary, {ROLE: "test"})
        await migrate.migrate(url(place(stack.urls.postgres_primary)), ROLE, SERVICES / ROLE / "migrations")
        yield stack


@asynccontextmanager
async def opened(root: Path, *, synchronous: bool) -> AsyncIterator[tuple[Stack, Database]]:
    async with (
        started(root, synchronous=synchronous) as stack,
        Database.opened(ROLE, settings(stack), Health()) as db,
    ):
        yield stack, db


def place(url: str) -> str:
    return url.rsplit("@", 1)[1].split("/")[0]


def url(*places: str) -> str:
    return f"postgresql://{ROLE}:test@{','.join(places)}/tenfold"


def settings(stack: Stack, **more: object) -> DataSettings:
    """Every host is named in both lists: whichever is the primary takes the writes, the others the reads."""
    places = [place(each) for each in (stack.urls.postgres_primary, *stack.urls.postgres_replicas)]
    values: dict[str, object] = {
        "database_url": url(*places),
        "database_replica_urls": tuple(url(each) for each in places),
        "database_acquire_seconds": 1.0,
        "database_statement_seconds": 1.0,
        "bus": "inline",
    }
    return DataSettings(**(values | more))  # type: ignore[arg-type]


class Writer:
    """Four clients that write one row after another. Keeps what was acknowledged, and how long each write took."""

    def __init__(self, db: Database) -> None:
        self.acknowledged: list[UUID] = []
        self.failed = 0
        self.slowest = 0.0
        self.longest_gap = 0.0
        self.token = ""
        self._last = time.monotonic()
        self._db = db

    async def write(self) -> bool:
        thing_id, began = new_id(), time.monotonic()
        try:
            with consistency.tracked(self.token) as positions:
                async with self._db.transaction() as tx:
                    await things.insert(tx, thing_id, str(thing_id))
        except Unavailable:
            self.failed += 1
            return False
        finally:
            self.slowest = max(self.slowest, time.monotonic() - began)
        self.longest_gap = max(self.longest_gap, time.monotonic() - self._last)
        self._last = time.monotonic()
        self.token = positions.token()
        self.acknowledged.append(thing_id)
        return True

    async def has_written(self, more: int) -> None:
        """Return after so many more acknowledged writes."""
        goal = len(self.acknowledged) + more
        await eventually(lambda: self._reached(goal), within=30)

    async def _reached(self, goal: int) -> bool:
        return len(self.acknowledged) >= goal

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def client() -> None:
            while True:
                if not await self.write():
                    await asyncio.sleep(0.02)

        clients = [asyncio.create_task(client()) for _ in range(4)]
        try:
            yield
        finally:
            for task in clients:
                task.cancel()
            for end in await asyncio.gather(*clients, return_exceptions=True):
                if isinstance(end, Exception):
                    raise end  # it met an error that is not `Unavailable`, and wrote no more

    async def lost(self) -> int:
        """How many acknowledged rows the primary does not have."""
        async with self._db.transaction() as tx:
            rows = await tx.fetch("SELECT id FROM things")
        return len(set(self.acknowledged) - {row["id"] for row in rows})


async def test_a_frozen_primary_costs_bounded_errors_and_no_restart(tmp_path: Path) -> None:
    async with started(tmp_path, synchronous=False, replicas=1) as stack:
        own = settings(stack, database_url=url(place(stack.urls.postgres_primary)))
        async with Database.opened(ROLE, own, Health()) as db:
            await things.create_table(db)
            writer = Writer(db)
            async with writer.running():
                await writer.has_written(50)
                stack.child("postgres-primary").pause()
                writer.slowest = 0.0
                before = writer.failed
                await eventually(lambda: _failed(writer, before + 20), within=30)
                # Reads that need no own write go on at the replica.
                assert await db.read(things.where) == "replica"
                stack.child("postgres-primary").resume()
                await writer.has_written(50)
            # A connection, BEGIN, the statement and COMMIT are each bounded by a second.
            print(f"\nprimary frozen: {writer.failed} writes answered 503, the slowest after {writer.slowest:.1f} s")
            assert writer.slowest < 4.5
            assert await writer.lost() == 0
        began = time.monotonic()
        async with Database.opened(ROLE, own, Health()) as db:
            assert await Writer(db).write()
            stack.child("postgres-primary").pause()
            began = time.monotonic()
        print(f"closed behind a frozen server in {time.monotonic() - began:.1f} s")
        stack.child("postgres-primary").resume()
        assert time.monotonic() - began < 10


async def _failed(writer: Writer, number: int) -> bool:
    return writer.failed >= number


@pytest.mark.parametrize("death", ["killed", "frozen"])
async def test_writes_resume_on_a_promoted_replica(tmp_path: Path, death: str) -> None:
    async with opened(tmp_path, synchronous=True) as (stack, db):
        await things.create_table(db)
        writer = Writer(db)
        async with writer.running():
            await writer.has_written(200)
            old = stack.child("postgres-primary")
            if death == "killed":
                await old.kill()
            else:
                old.pause()
            await stack.promote()
            await writer.has_written(1)
            await writer.has_written(200)
            if death == "frozen":
                old.resume()  # it believes to be the primary still, and no replica confirms its commits
                await writer.has_written(200)
        lost = await writer.lost()
        print(
            f"\nprimary {death}, replica promoted: no write for {writer.longest_gap:.1f} s; "
            f"{len(writer.acknowledged)} acknowledged, {lost} lost, "
            f"{writer.failed} answered 503, the slowest after {writer.slowest:.1f} s"
        )
        assert lost == 0
        with consistency.tracked(writer.token):
            assert await db.read(things.exists, writer.acknowledged[-1])

        async def replica_honours_the_new_timeline() -> bool:
            with consistency.tracked(writer.token):
                return await db.read(things.where) == "replica"

        began = time.monotonic()
        await eventually(replica_honours_the_new_timeline, within=60)
        print(f"the other replica answers tokens of the new timeline after {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("synchronous", [True, False])
async def test_what_a_promotion_can_lose(tmp_path: Path, synchronous: bool) -> None:
    """The replicas are away, the primary goes on for a moment and dies: what only it has seen is gone, unless commits
    wait for a replica. Then they were never acknowledged."""
    async with opened(tmp_path, synchronous=synchronous) as (stack, db):
        await things.create_table(db)
        writer = Writer(db)
        for _ in range(20):
            assert await writer.write()
        replicas = [stack.child(f"postgres-replica-{n}") for n in range(2)]
        for replica in replicas:
            await replica.kill()
        for _ in range(5):
            await writer.write()
        await stack.child("postgres-primary").kill()
        for replica in replicas:
            await replica.start()
        await stack.promote()
        await eventually(writer.write, within=30)
        lost = await writer.lost()
        print(f"\n{synchronous=}: {len(writer.acknowledged)} acknowledged, {writer.failed} refused, {lost} lost")
        assert lost == (0 if synchronous else 5)


async def test_a_host_that_is_no_primary_is_passed_over(tmp_path: Path) -> None:
    async with started(tmp_path, synchronous=False, replicas=1) as stack:
        backwards = url("127.0.0.1:1", place(stack.urls.postgres_replicas[0]), place(stack.urls.postgres_primary))
        own = settings(stack, database_url=backwards)
        async with Database.opened(ROLE, own, Health()) as db, db.transaction() as tx:
            assert await things.where(tx) == "primary"
        only_replica = url(place(stack.urls.postgres_replicas[0]))
        async with Database.opened(ROLE, settings(stack, database_url=only_replica), Health()) as db:
            with pytest.raises(Unavailable):
                async with db.transaction() as tx:
                    await tx.execute("SELECT 1")
