"""Relay and batched consumer against aiokafka itself, on Apache Kafka: `make bench-events`.

Rounds alternate, so that what else the machine does touches both; the figures are medians, and only their ratio means
something elsewhere. The relay's rows and the consumer's inbox and effects are real, in PostgreSQL.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import aiokafka
import uvloop

from devstack.stack import Stack
from devstack.topology import Topology
from shared import migrate
from shared.bus import KafkaBus
from shared.consumer import Consumer, On
from shared.database import Database, Transaction
from shared.events import Envelope, Event
from shared.health import Health
from shared.ids import new_id
from shared.outbox import Outbox, Relay
from shared.settings import DataSettings

RESULTS = Path(__file__).parent / "results" / "events.md"
MIGRATIONS = Path(__file__).parent.parent / "services" / "users" / "migrations"
EVENTS = 20_000
ROUNDS = 5
KEYS = 1000


class Measured(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "thing.measured.v1"
    TOPIC: ClassVar = "bench.events"
    KEY: ClassVar = "thing_id"

    thing_id: UUID
    number: int


class Bench:
    def __init__(self, settings: DataSettings, db: Database, bus: KafkaBus) -> None:
        self.servers = list(settings.kafka_bootstrap)
        self.settings = settings
        self.db = db
        self.bus = bus
        keys = [new_id() for _ in range(KEYS)]
        self.events = [Measured(thing_id=keys[n % KEYS], number=n) for n in range(EVENTS)]
        self.records = [Envelope.wrap(event, "bench").to_record() for event in self.events]

    async def raw_send(self) -> float:
        """The same records by `send_batch`, six partitions at a time."""
        async with aiokafka.AIOKafkaProducer(bootstrap_servers=self.servers, acks="all", enable_idempotence=True) as p:
            await p.partitions_for(Measured.TOPIC)
            started = time.perf_counter()
            await asyncio.gather(*(self._send_partition(p, n) for n in range(6)))
            return time.perf_counter() - started

    async def _send_partition(self, producer: Any, number: int) -> None:
        batch = producer.create_batch()
        for key, value, headers in self.records[number::6]:
            if batch.append(key=key, value=value, timestamp=None, headers=headers) is None:
                await (await producer.send_batch(batch, Measured.TOPIC, partition=number))
                batch = producer.create_batch()
                batch.append(key=key, value=value, timestamp=None, headers=headers)
        await (await producer.send_batch(batch, Measured.TOPIC, partition=number))

    async def relay(self) -> float:
        """The outbox's rows, until the table is empty."""
        relay = Relay("bench", self.db, self.bus)
        outbox = Outbox("bench", relay)
        for start in range(0, EVENTS, 1000):
            async with self.db.transaction() as tx:
                await outbox.add(tx, *self.events[start : start + 1000])
        started = time.perf_counter()
        shards = await relay.sweep()
        while shards:
            shards = await relay.sweep(shards)
        return time.perf_counter() - started

    async def raw_read(self) -> float:
        """`getmany` in a group of its own and one commit a fetch; nothing is decoded."""
        async with aiokafka.AIOKafkaConsumer(
            Measured.TOPIC, bootstrap_servers=self.servers, group_id=str(new_id()), enable_auto_commit=False,
            auto_offset_reset="earliest",
        ) as consumer:  # fmt: skip
            started, number = time.perf_counter(), 0
            while number < EVENTS:
                batches = await consumer.getmany(timeout_ms=500, max_records=6000)
                number += sum(len(batch) for batch in batches.values())
                await consumer.commit()
            return (time.perf_counter() - started) * EVENTS / number

    async def consume(self) -> float:
        """A batched consumer in a group of its own: decoded, inbox, one effect an event, commit."""
        group, number = str(new_id()), 0
        enough = asyncio.Event()

        async def one(_delivery: object) -> None:
            raise AssertionError("a batch was taken apart")

        async def many(tx: Transaction, events: Sequence[Measured]) -> None:
            nonlocal number
            await tx.execute(
                "INSERT INTO effects (thing_id, number) SELECT * FROM unnest($1::uuid[], $2::int[])",
                [event.thing_id for event in events],
                [event.number for event in events],
            )
            number += len(events)
            if number >= EVENTS:
                enough.set()

        consumer = Consumer(group, [On(Measured, one, batch=many)], self.db)
        joined = time.perf_counter()
        async with self.bus.consuming(consumer, 4):
            while not number:
                joined = time.perf_counter()
                await asyncio.sleep(0.002)
            before = number
            await enough.wait()
            return (time.perf_counter() - joined) * EVENTS / (number - before or 1)


async def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        topology = Topology.backing(replicas=0, redis=0, broker="apache")
        async with Stack(topology, root=Path(root), durable=True, keep_data=False) as stack:
            assert stack.urls.kafka
            await migrate.migrate(stack.database_url("users"), "users", MIGRATIONS)
            settings = DataSettings(database_url=stack.database_url("users"), kafka_bootstrap=(stack.urls.kafka,))
            health = Health()
            async with Database.opened("bench", settings, health) as db, KafkaBus.opened(settings, health) as bus:
                async with db.transaction() as tx:
                    await tx.execute("CREATE TABLE effects (thing_id uuid, number int)")
                await bus.ensure({Measured.TOPIC})
                report = await measure(Bench(settings, db, bus))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report)
    print(report)


async def measure(bench: Bench) -> str:
    lines = [
        "# The event path against aiokafka itself",
        "",
        f"Medians of {ROUNDS} alternating rounds of {EVENTS:,} events, Apache Kafka, Python {sys.version.split()[0]}.",
        "",
        "| | events/s | raw aiokafka | ratio |",
        "|---|---|---|---|",
    ]
    pairs: list[tuple[str, Callable[[], Awaitable[float]], Callable[[], Awaitable[float]]]] = [
        ("relay (read outbox, send, delete) / `send_batch`", bench.relay, bench.raw_send),
        ("batched consumer (decode, inbox, effect, commit) / `getmany`", bench.consume, bench.raw_read),
    ]
    for name, ours, raw in pairs:
        await ours()
        await raw()
        rounds = [(await ours(), await raw()) for _ in range(ROUNDS)]
        mine, theirs = (EVENTS / statistics.median(column) for column in zip(*rounds, strict=True))
        lines.append(f"| {name} | {mine:,.0f} | {theirs:,.0f} | {mine / theirs:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
