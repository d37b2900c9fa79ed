"""The event path on Apache Kafka while its processes and its broker are killed, frozen and restarted."""

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID

import aiokafka
import pytest

from devstack.stack import Stack
from devstack.topology import Topology
from shared import migrate
from shared.bus import KafkaBus
from shared.database import Database
from shared.events import Envelope
from shared.health import Health
from shared.ids import new_id
from shared.outbox import Outbox, Relay
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import SERVICES
from tests.integration.shared import things
from tests.integration.shared.things import ThingMade

pytestmark = pytest.mark.timeout(400)
KEYS = 10
GROUP = "chaos"


class World:
    """A writer in the test's process; relays and consumers are processes."""

    def __init__(self, stack: Stack, settings: DataSettings, db: Database, made: type[ThingMade]) -> None:
        self.stack = stack
        self.settings = settings
        self.db = db
        self.made = made
        self.keys = [new_id() for _ in range(KEYS)]
        self.written: Counter[UUID] = Counter()
        # Only adds: a relay that is never opened moves nothing.
        self.outbox = Outbox("things", Relay("things", db, KafkaBus(settings, Health())))
        self._outputs: list[asyncio.Task[bytes]] = []

    async def write(self, number: int) -> None:
        """`number` events, spread over the keys, each key's numbered from 0."""
        for i in range(number):
            key = self.keys[i % KEYS]
            async with self.db.transaction() as tx:
                await self.outbox.add(tx, self.made(thing_id=key, number=self.written[key]))
            self.written[key] += 1

    @asynccontextmanager
    async def process(self, kind: str, instance: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
        program = await self.start(kind, instance)
        try:
            yield program
        finally:
            await stop(program)

    async def start(self, kind: str, instance: str = "") -> asyncio.subprocess.Process:
        env = os.environ | {
            "DATABASE_URL": self.settings.database_url,
            "KAFKA_BOOTSTRAP": ",".join(self.settings.kafka_bootstrap),
            "KAFKA_SESSION_TIMEOUT_SECONDS": "6",
            "KAFKA_INSTANCE_ID": instance,
        }
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.programs", kind, self.made.TOPIC, GROUP,
            env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert program.stdout is not None
        while (line := await program.stdout.readline()) and line != b"ready\n":
            pass
        self._outputs.append(asyncio.create_task(program.stdout.read()))  # or its pipe fills up
        return program

    async def outbox_size(self) -> int:
        async with self.db.transaction() as tx:
            return await things.outbox_size(tx)

    async def drained(self, within: float = 60) -> None:
        async def empty() -> bool:
            return await self.outbox_size() == 0

        await eventually(empty, within=within)

    async def records(self) -> list[Envelope]:
        """All that the topic holds, each partition in its order."""
        async with aiokafka.AIOKafkaConsumer(
            self.made.TOPIC, bootstrap_servers=list(self.settings.kafka_bootstrap), auto_offset_reset="earliest"
        ) as reader:
            partitions = reader.assignment()
            ends = await reader.end_offsets(partitions)
            found: list[Envelope] = []
            async with asyncio.timeout(60):
                while any([await reader.position(p) < ends[p] for p in partitions]):
                    for batch in (await reader.getmany(timeout_ms=200)).values():
                        found += [Envelope.from_record(record) for record in batch]
            return found

    async def report(self, what: str) -> None:
        """Assert that the topic has every event, each key's in order; print what was repeated."""
        found = await self.records()
        first: dict[UUID, tuple[UUID, int]] = {}
        for envelope in found:
            event = envelope.decode(self.made)
            first.setdefault(envelope.id, (event.thing_id, event.number))
        lost = sum(self.written.values()) - len(first)
        inversions = count_inversions(list(first.values()))
        print(
            f"{what}: events {len(first)}, lost {lost}, inversions {inversions}, duplicates {len(found) - len(first)}"
        )
        assert (lost, inversions) == (0, 0)

    async def effects(self) -> list[tuple[UUID, int]]:
        async with self.db.transaction() as tx:
            return list(await things.effects(tx, GROUP))

    async def all_effects(self, what: str, within: float = 90) -> None:
        """Wait until every event has its effect; assert one each, in order of its key."""

        async def there() -> bool:
            return len(set(await self.effects())) >= sum(self.written.values())

        await eventually(there, within=within, every=0.2)
        effects = await self.effects()
        double = len(effects) - len(set(effects))
        inversions = count_inversions(effects)
        print(f"{what}: effects {len(effects)}, lost 0, double {double}, inversions {inversions}")
        assert (double, inversions) == (0, 0)


def count_inversions(numbered: list[tuple[UUID, int]]) -> int:
    last: dict[UUID, int] = {}
    inversions = 0
    for key, number in numbered:
        inversions += number < last.get(key, -1)
        last[key] = number
    return inversions


def test_the_count_of_inversions_sees_one() -> None:
    key, other = new_id(), new_id()
    assert count_inversions([(key, 0), (other, 5), (key, 1)]) == 0
    assert count_inversions([(key, 1), (other, 5), (key, 0)]) == 1


async def stop(program: asyncio.subprocess.Process) -> None:
    if program.returncode is None:
        program.send_signal(signal.SIGCONT)
        program.terminate()
        try:
            async with asyncio.timeout(40):
                await program.wait()
        except TimeoutError:
            program.kill()
            raise


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    topology = Topology.backing(replicas=0, redis=0)
    async with Stack(topology, root=tmp_path_factory.mktemp("stack"), durable=False, keep_data=False) as opened:
        if opened.broker_kind != "apache":
            pytest.skip("needs Apache Kafka: the stand-in keeps nothing over a kill")
        yield opened


@pytest.fixture
async def world(stack: Stack) -> AsyncIterator[World]:
    name = f"things_{new_id().hex[-8:]}"
    await migrate.bootstrap(stack.urls.postgres_primary, {name: "test"})
    url = stack.urls.postgres_primary
    url = f"postgresql://{name}:test@{url.rpartition('@')[2]}"
    await migrate.migrate(url, name, SERVICES / "users" / "migrations")
    assert stack.urls.kafka
    settings = DataSettings(
        database_url=url, kafka_bootstrap=(stack.urls.kafka,), kafka_session_timeout_seconds=6, drain_seconds=0
    )
    async with AsyncExitStack() as opened:
        db = await opened.enter_async_context(Database.opened("things", settings, Health()))
        await things.create_table(db)
        yield World(stack, settings, db, things.event_type(f"{name}.events"))


async def test_a_relay_killed_after_the_broker_s_acknowledgement(world: World) -> None:
    await world.write(200)
    for _ in range(3):
        program = await world.start("relay-deaf")
        async with asyncio.timeout(60):
            assert await program.wait() == -signal.SIGKILL
        await world.write(20)
    async with world.process("relay"):
        await world.drained()
    await world.report("relay killed 3 times after the acknowledgement")


async def test_relays_killed_at_any_time_and_two_at_work(world: World) -> None:
    async with world.process("relay"):
        for _ in range(3):
            program = await world.start("relay")
            await world.write(150)
            program.kill()
            await program.wait()
        await world.drained()
    await world.report("two relays on the same keys, one killed 3 times")


async def test_a_frozen_broker_fails_no_write_and_the_backlog_drains(world: World) -> None:
    seconds = 60
    broker = world.stack.child("kafka")
    async with world.process("relay"):
        await world.write(50)
        await world.drained()
        failed = 0
        broker.pause()
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                try:
                    await world.write(10)
                except Exception:
                    failed += 1
                await asyncio.sleep(0.02)  # the rate of the writes, not a wait
        finally:
            broker.resume()
        backlog, resumed = await world.outbox_size(), time.monotonic()
        await world.drained(within=120)
        took = time.monotonic() - resumed
        print(f"broker frozen {seconds} s: backlog {backlog}, drained in {took:.1f} s, failed writes {failed}")
        assert failed == 0
    await world.report(f"broker frozen {seconds} s")


async def test_a_killed_broker_loses_nothing(world: World) -> None:
    broker = world.stack.child("kafka")
    async with world.process("relay"), world.process("consumer-batch"):
        await world.write(100)
        await broker.kill()
        await world.write(100)
        await broker.start()
        await world.write(100)
        await world.all_effects("broker killed and started again", within=180)
        await world.drained()
    await world.report("broker killed and started again")


@pytest.mark.parametrize("kind", ["consumer", "consumer-batch"])
async def test_a_consumer_frozen_past_its_session(world: World, kind: str) -> None:
    async with world.process("relay"), world.process(kind) as frozen:
        writing = asyncio.create_task(world.write(1500))
        await eventually(world.effects, within=60)
        frozen.send_signal(signal.SIGSTOP)
        await writing
        async with world.process(kind):
            await world.all_effects(f"{kind} frozen past its session, another took over")
            frozen.send_signal(signal.SIGCONT)
            await world.write(200)
            await world.all_effects("and resumed")


@pytest.mark.parametrize(
    ("kind", "names"),
    [("consumer", ("", "")), ("consumer-batch", ("one", "two"))],
    ids=["one by one, dynamic members", "batches, static members"],
)
async def test_rolling_restarts_of_consumers(world: World, kind: str, names: tuple[str, str]) -> None:
    async with world.process("relay"):
        consumers = [await world.start(kind, name) for name in names]
        writing = asyncio.create_task(world.write(4000))
        for restart in range(20):
            place = restart % 2
            await stop(consumers[place])
            consumers[place] = await world.start(kind, names[place])
        await writing
        await world.all_effects(f"20 rolling restarts ({kind}, members named {names})", within=120)
        for consumer in consumers:
            await stop(consumer)
