"""Relay and batched consumer against aiokafka itself, on Apache Kafka: `make bench-events`.

Rounds alternate, so that what else the machine does touches all; the figures are medians, and only their ratio means
something elsewhere. The relay's rows and the consumer's inbox and effects are real, in PostgreSQL, which flushes. The
raw client has the best settings that were found, the same ones as ours. What ours does in the database is measured
alone too: the same statements on as many connections, with no broker.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast
from uuid import UUID

import aiokafka
import uvloop

from devstack.stack import Stack
from devstack.topology import Topology
from shared import migrate
from shared.bus import KafkaBus
from shared.consumer import Consumer, On
from shared.database import Database, Transaction
from shared.errors import Unavailable
from shared.events import Envelope, Event, Message
from shared.health import Check, Health
from shared.ids import new_id
from shared.outbox import Outbox, Relay
from shared.records import Fetched, decode_headers
from shared.runner import spare_collector
from shared.settings import DataSettings

RESULTS = Path(__file__).parent / "results" / "events.md"
MIGRATIONS = Path(__file__).parent.parent / "services" / "users" / "migrations"
EVENTS = 100_000
ROUNDS = 5
KEYS = 1000
AT_ONCE = 8  # as services have it
RAW_TOPIC = "bench.raw"
RAW = {"send_batch": "send", "getmany": "read"}
TITLES = {
    "relay": "relay: read the outbox, send, delete",
    "send_batch": "aiokafka's `send_batch`",
    "relay_database": "the relay's part in the database alone",
    "consume": "batched consumer: decode, inbox, effect, commit",
    "getmany": "aiokafka's `getmany`",
    "consume_database": "the consumer's part in the database alone",
}


class Measured(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "thing.measured.v1"
    TOPIC: ClassVar = "bench.events"
    KEY: ClassVar = "thing_id"

    thing_id: UUID
    number: int


class Read(Measured, frozen=True, kw_only=True):
    """Of a topic that holds `EVENTS` and no more, so that nobody is measured fetching what is not counted."""

    TOPIC: ClassVar = "bench.read"


class Cost(NamedTuple):
    """Microseconds, of the clock and of this process's CPU: at some moment, or an event."""

    wall: float
    cpu: float


def now() -> Cost:
    return Cost(time.perf_counter() * 1e6, time.process_time() * 1e6)


def since(started: Cost, events: int = EVENTS) -> Cost:
    ended = now()
    return Cost((ended.wall - started.wall) / events, (ended.cpu - started.cpu) / events)


class Joining(Health):
    """Tells when a consumer has its partitions: that is when the client's own `start` returns too."""

    def __init__(self) -> None:
        super().__init__()
        self._members: dict[str, Check] = {}

    def add(self, name: str, check: Check) -> None:
        self._members[name] = check

    async def joined(self, group: str) -> None:
        while True:
            with suppress(Unavailable):
                await self._members[f"{group}-consumer"]()
                return
            await asyncio.sleep(0.001)


class Bench:
    def __init__(self, settings: DataSettings, db: Database, bus: KafkaBus, health: Joining) -> None:
        self.servers = list(settings.kafka_bootstrap)
        self.settings = settings
        self.db = db
        self.bus = bus
        self.health = health
        keys = [new_id() for _ in range(KEYS)]
        self.events = [Measured(thing_id=keys[n % KEYS], number=n) for n in range(EVENTS)]
        self.to_read = [Read(thing_id=event.thing_id, number=event.number) for event in self.events]
        self.records = [(m.key.encode(), m.data, decode_headers(m.headers)) for m in self.as_new()]
        spare_collector()  # for all contenders, as in every process of ours

    def as_new(self) -> list[Message]:
        """The events under new ids."""
        return [envelope.to_message() for envelope in Envelope.wrap_all(self.events, "bench")]

    async def raw_send(self) -> Cost:
        """The same records by `send_batch`, six partitions at a time."""
        async with aiokafka.AIOKafkaProducer(
            bootstrap_servers=self.servers, acks="all", enable_idempotence=True, max_batch_size=512 * 1024
        ) as producer:
            await producer.partitions_for(RAW_TOPIC)
            started = now()
            await asyncio.gather(*(self._send_partition(producer, n) for n in range(6)))
            return since(started)

    async def _send_partition(self, producer: Any, number: int) -> None:
        batch = producer.create_batch()
        for key, value, headers in self.records[number::6]:
            if batch.append(key=key, value=value, timestamp=None, headers=headers) is None:
                await (await producer.send_batch(batch, RAW_TOPIC, partition=number))
                batch = producer.create_batch()
                batch.append(key=key, value=value, timestamp=None, headers=headers)
        await (await producer.send_batch(batch, RAW_TOPIC, partition=number))

    async def fill_outbox(self, events: Sequence[Event]) -> Relay:
        relay = Relay("bench", self.db, self.bus)
        outbox = Outbox("bench", relay)
        for start in range(0, EVENTS, 1000):
            async with self.db.transaction() as tx:
                await outbox.add(tx, *events[start : start + 1000])
        return relay

    async def fill_topic(self) -> None:
        """With what the consumers read."""
        await self.drain(await self.fill_outbox(self.to_read))

    async def relay(self) -> Cost:
        """The outbox's rows, until the table is empty."""
        return await self.drain(await self.fill_outbox(self.events))

    async def drain(self, relay: Relay) -> Cost:
        started = now()
        more = await relay.sweep()
        while more:
            more = await relay.sweep(look=False)
        return since(started)

    async def relay_database(self) -> Cost:
        """What the relay does in the database, for a bus that takes everything at once."""
        bus, self.bus = self.bus, cast("KafkaBus", Nowhere())
        try:
            return await self.relay()
        finally:
            self.bus = bus

    async def raw_read(self) -> Cost:
        """`getmany` in a group of its own and one commit a fetch; nothing is decoded."""
        async with aiokafka.AIOKafkaConsumer(
            Read.TOPIC, bootstrap_servers=self.servers, group_id=str(new_id()), enable_auto_commit=False,
            auto_offset_reset="earliest", fetch_max_wait_ms=100,
        ) as consumer:  # fmt: skip
            started, number = now(), 0
            while number < EVENTS:
                batches = await consumer.getmany(timeout_ms=500, max_records=6000)
                number += sum(len(batch) for batch in batches.values())
                await consumer.commit()
            return since(started, number)

    async def consume(self) -> Cost:
        """A batched consumer in a group of its own: decoded, inbox, one effect an event, commit."""
        number = 0
        enough = asyncio.Event()

        async def many(tx: Transaction, events: Sequence[Read]) -> None:
            nonlocal number
            await have_effect(tx, events)
            number += len(events)
            if number >= EVENTS:
                enough.set()

        consumer = Consumer(str(new_id()), [On(Read, one, batch=many)], self.db)
        async with self.bus.consuming(consumer, AT_ONCE):
            await self.health.joined(consumer.group)
            started = now()
            await enough.wait()
            return since(started)

    async def consume_database(self) -> Cost:
        """What the consumer does in the database, for events that are decoded already."""
        consumer = Consumer(str(new_id()), [On(Measured, one, batch=have_effect)], self.db)
        records = [
            Fetched(Measured.TOPIC, 0, n, 0, message.key.encode(), message.data, message.headers)
            for n, message in enumerate(self.as_new())
        ]
        batches = [records[start : start + 1000] for start in range(0, EVENTS, 1000)]

        async def work() -> None:
            while batches:
                assert not await consumer.handle_batch(batches.pop())

        started = now()
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        return since(started)


class Nowhere:
    batch = KafkaBus.batch

    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        return [None] * len(messages)


async def one(_delivery: object) -> None:
    raise AssertionError("a batch was taken apart")


async def have_effect(tx: Transaction, events: Sequence[Measured]) -> None:
    await tx.execute(
        "INSERT INTO effects (thing_id, number) SELECT * FROM unnest($1::uuid[], $2::int[])",
        [event.thing_id for event in events],
        [event.number for event in events],
    )


async def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        topology = Topology.backing(replicas=0, redis=0, broker="apache")
        async with Stack(topology, root=Path(root), durable=True, keep_data=False) as stack:
            assert stack.urls.kafka
            await migrate.migrate(stack.database_url("users"), "users", MIGRATIONS)
            settings = DataSettings(database_url=stack.database_url("users"), kafka_bootstrap=(stack.urls.kafka,))
            health = Joining()
            async with Database.opened("bench", settings, health) as db, KafkaBus.opened(settings, health) as bus:
                async with db.transaction() as tx:
                    await tx.execute("CREATE TABLE effects (thing_id uuid, number int)")
                await bus.ensure({Measured.TOPIC, Read.TOPIC, RAW_TOPIC})
                bench = Bench(settings, db, bus, health)
                await bench.fill_topic()
                report = await measure(bench)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report)
    print(report)


async def measure(bench: Bench) -> str:
    lines = [
        "# The event path against aiokafka itself",
        "",
        f"Medians of {ROUNDS} alternating rounds of {EVENTS:,} events, Apache Kafka, Python {sys.version.split()[0]},",
        f"{os.cpu_count()} processors for the client, PostgreSQL and the broker.",
        "",
        "| | events/s | CPU us an event, of this process |",
        "|---|---:|---:|",
    ]
    ratios: list[str] = []
    for ours, raw, database in (
        ("relay", "send_batch", "relay_database"),
        ("consume", "getmany", "consume_database"),
    ):
        contenders: dict[str, Callable[[], Awaitable[Cost]]] = {
            ours: getattr(bench, ours), raw: getattr(bench, f"raw_{RAW[raw]}"), database: getattr(bench, database),
        }  # fmt: skip
        rounds: dict[str, list[Cost]] = {name: [] for name in contenders}
        for number in range(ROUNDS + 1):
            for name, contender in contenders.items():
                cost = await contender()
                if number:  # the first warms up
                    rounds[name].append(cost)
        speed = {name: 1e6 / statistics.median(cost.wall for cost in found) for name, found in rounds.items()}
        for name, found in rounds.items():
            cpu = statistics.median(cost.cpu for cost in found)
            lines.append(f"| {TITLES[name]} | {speed[name]:,.0f} | {cpu:.1f} |")
        slower = min(raw, database, key=speed.__getitem__)
        for to, name in ((raw, TITLES[raw]), (slower, f"the slower of the two bounds ({TITLES[slower]})")):
            # Of the rounds that ran next to each other, for the machine is not the same in all.
            ratio = statistics.median(b.wall / a.wall for a, b in zip(rounds[ours], rounds[to], strict=True))
            ratios.append(f"| {TITLES[ours]} / {name} | {ratio:.2f} |")
    lines += ["", "| ratio (goal 0.7) | |", "|---|---:|", *ratios]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
