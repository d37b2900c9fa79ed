"""One service that publishes and consumes its own event, for the tests of the event path."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from shared.bus import InlineBus, KafkaBus
from shared.consumer import Consumer, Delivery, On
from shared.database import Database, Transaction
from shared.health import Health
from shared.outbox import Outbox, Relay
from shared.settings import DataSettings
from tests.integration.shared import things
from tests.integration.shared.things import ThingMade


@dataclass
class World:
    db: Database
    bus: KafkaBus | InlineBus
    relay: Relay
    outbox: Outbox
    made: type[ThingMade]
    group: str
    faults: list[Exception] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    calls: int = 0
    batches: int = 0

    async def make(self, thing_id: object, number: int) -> None:
        async with self.db.transaction() as tx:
            await self.outbox.add(tx, self.made(thing_id=thing_id, number=number))  # type: ignore[arg-type]

    async def note(self, delivery: Delivery[ThingMade]) -> None:
        self.calls += 1
        if delivery.event.number in self.bad:
            raise RuntimeError(f"no {delivery.event.number}")
        if self.faults:
            raise self.faults.pop(0)
        async with delivery.transaction() as tx:
            await tx.execute(
                "INSERT INTO effects (consumer, thing_id, number) VALUES ($1, $2, $3)",
                self.group,
                delivery.event.thing_id,
                delivery.event.number,
            )

    async def note_all(self, tx: Transaction, events: Sequence[ThingMade]) -> None:
        self.batches += 1
        await tx.execute(
            "INSERT INTO effects (consumer, thing_id, number) SELECT $1, * FROM unnest($2::uuid[], $3::int[])",
            self.group,
            [event.thing_id for event in events],
            [event.number for event in events],
        )

    def consumer(self, retry_delays: Sequence[float] = (), *, ordered: bool = True, batch: bool = False) -> Consumer:
        on = On(self.made, self.note, ordered, self.note_all if batch else None)
        return Consumer(self.group, [on], self.db, retry_delays)

    async def effects(self) -> list[tuple[object, int]]:
        async with self.db.transaction() as tx:
            return list(await things.effects(tx, self.group))

    async def count(self, table: str) -> int:
        async with self.db.transaction() as tx:
            return int(await tx.fetchval(f"SELECT count(*) FROM {table}"))

    async def has(self, table: str, number: int) -> bool:
        return await self.count(table) == number

    async def has_effects(self, number: int) -> bool:
        return len(await self.effects()) >= number

    async def outbox_is_empty(self) -> bool:
        async with self.db.transaction() as tx:
            return await things.outbox_size(tx) == 0


@asynccontextmanager
async def opened(kind: str, data_settings: DataSettings, health: Health) -> AsyncIterator[World]:
    """On `kafka` or `inline`."""
    topic = f"things-{secrets.token_hex(4)}.events"
    settings = msgspec.structs.replace(data_settings, bus=kind, shutdown_seconds=2)
    async with AsyncExitStack() as stack:
        db = await stack.enter_async_context(Database.opened("things", settings, health))
        await things.create_table(db)
        bus: KafkaBus | InlineBus
        if kind == "kafka":
            bus = await stack.enter_async_context(KafkaBus.opened(settings, health))
        else:
            bus = InlineBus()
            bus.open_for_delivery()
        relay = await stack.enter_async_context(Relay.opened("things", db, bus))
        made = things.event_type(topic)
        yield World(db, bus, relay, Outbox("things", relay), made, f"group-{secrets.token_hex(4)}")
