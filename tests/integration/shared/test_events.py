"""The event path: outbox, relay, bus, consumer, inbox."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import aiokafka
import msgspec
import pytest

from shared import consistency
from shared.bus import InlineBus, KafkaBus
from shared.consumer import Consumer, Delivery, On, clean_up
from shared.database import Connection, Database
from shared.errors import Unavailable
from shared.events import Envelope
from shared.health import Health
from shared.ids import new_id
from shared.outbox import Outbox, Relay
from shared.settings import DataSettings
from shared.testing import eventually
from tests.integration.shared import things
from tests.integration.shared.things import ThingMade


@dataclass
class World:
    """One service that publishes and consumes its own event."""

    db: Database
    bus: KafkaBus | InlineBus
    relay: Relay
    outbox: Outbox
    made: type[ThingMade]
    group: str
    faults: list[Exception] = field(default_factory=list)
    calls: int = 0

    async def make(self, thing_id: object, number: int) -> None:
        async with self.db.transaction() as tx:
            await self.outbox.add(tx, self.made(thing_id=thing_id, number=number))  # type: ignore[arg-type]

    async def note(self, delivery: Delivery[ThingMade]) -> None:
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)
        async with delivery.transaction() as tx:
            await tx.execute(
                "INSERT INTO effects (consumer, thing_id, number) VALUES ($1, $2, $3)",
                self.group,
                delivery.event.thing_id,
                delivery.event.number,
            )

    def consumer(self) -> Consumer:
        return Consumer(self.group, [On(self.made, self.note)], self.db, self.bus)

    async def effects(self) -> list[tuple[object, int]]:
        async with self.db.transaction() as tx:
            return list(await things.effects(tx, self.group))

    async def has_effects(self, number: int) -> bool:
        return len(await self.effects()) >= number

    async def outbox_is_empty(self) -> bool:
        async with self.db.transaction() as tx:
            return await things.outbox_size(tx) == 0


@pytest.fixture(params=["kafka", "inline"])
async def world(request: pytest.FixtureRequest, data_settings: DataSettings, health: Health) -> AsyncIterator[World]:
    topic = f"things-{secrets.token_hex(4)}.events"
    settings = msgspec.structs.replace(data_settings, bus=request.param)
    async with AsyncExitStack() as opened:
        db = await opened.enter_async_context(Database.opened("things", settings, health))
        await things.create_table(db)
        bus: KafkaBus | InlineBus
        if request.param == "kafka":
            bus = await opened.enter_async_context(KafkaBus.opened(settings, health))
        else:
            bus = InlineBus()
            bus.open_for_delivery()
        relay = await opened.enter_async_context(Relay.opened("things", db, bus))
        made = things.event_type(topic)
        yield World(db, bus, relay, Outbox("things", relay), made, f"group-{secrets.token_hex(4)}")


@pytest.fixture
async def stack(world: World) -> AsyncIterator[AsyncExitStack]:
    """Closes what a test entered, before the world it stands on."""
    async with AsyncExitStack() as opened:
        yield opened


async def test_an_event_has_its_effect_once_and_leaves_the_outbox(world: World, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    thing_id = new_id()
    await world.make(thing_id, 1)
    await eventually(lambda: world.has_effects(1), within=30)
    await eventually(world.outbox_is_empty)
    assert await world.effects() == [(thing_id, 1)]


async def test_a_rolled_back_change_publishes_nothing(world: World, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    with pytest.raises(RuntimeError):
        async with world.db.transaction() as tx:
            await world.outbox.add(tx, world.made(thing_id=new_id(), number=0))
            raise RuntimeError
    await world.make(last := new_id(), 1)
    await eventually(lambda: world.has_effects(1), within=30)
    assert await world.effects() == [(last, 1)]


async def test_events_of_one_key_keep_their_order(world: World, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 8))
    # A second relay competes for the shards all the while.
    await stack.enter_async_context(Relay.opened("things", world.db, world.bus))
    keys = [new_id() for _ in range(5)]
    for number in range(20):
        await asyncio.gather(*(world.make(key, number) for key in keys))
    await eventually(lambda: world.has_effects(100), within=30)
    effects = await world.effects()
    assert len(effects) == 100
    for key in keys:
        assert [number for thing_id, number in effects if thing_id == key] == list(range(20))


async def test_an_event_delivered_ten_times_has_one_effect(world: World) -> None:
    consumer = world.consumer()
    envelope = Envelope.wrap(world.made(thing_id=new_id(), number=1), "things")
    await asyncio.gather(*(consumer.handle(envelope) for _ in range(10)))
    assert world.calls == 10
    assert len(await world.effects()) == 1


async def test_what_was_handled_long_ago_is_forgotten(world: World) -> None:
    for number in range(2):
        await world.consumer().handle(Envelope.wrap(world.made(thing_id=new_id(), number=number), "things"))
    async with world.db.transaction() as tx:
        await tx.execute(
            "UPDATE inbox SET handled_at = now() - interval '31 days'"
            " WHERE event_id = (SELECT event_id FROM inbox LIMIT 1)"
        )
    assert await clean_up(world.db) == 1


async def test_a_handler_that_fails_is_tried_again(world: World, stack: AsyncExitStack) -> None:
    world.faults = [RuntimeError("first"), RuntimeError("second")]
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    await world.make(new_id(), 1)
    await eventually(lambda: world.has_effects(1), within=30)
    assert world.calls == 3


async def test_what_is_down_is_waited_for(world: World, stack: AsyncExitStack) -> None:
    world.faults = [Unavailable("down") for _ in range(6)]
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    await world.make(new_id(), 1)
    await eventually(lambda: world.has_effects(1), within=30)
    assert len(await world.effects()) == 1


async def test_an_event_that_always_fails_is_buried_with_its_reason_and_stops_nobody(
    world: World, stack: AsyncExitStack, data_settings: DataSettings
) -> None:
    world.faults = [RuntimeError("no way") for _ in range(4)]
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 1))
    key = new_id()
    await world.make(key, 1)
    await world.make(key, 2)
    await eventually(lambda: world.has_effects(1), within=30)
    assert await world.effects() == [(key, 2)]
    reasons = await _dead_letters(world, data_settings)
    assert reasons == ["RuntimeError: no way"]


async def _dead_letters(world: World, settings: DataSettings) -> list[str]:
    if isinstance(world.bus, InlineBus):
        async with world.db.transaction() as tx:
            return [row["reason"] for row in await tx.fetch("SELECT reason FROM dead_letters")]
    records = await _read_topic(settings, f"{world.made.TOPIC}.{world.group}.dead", 1)
    return [dict(record.headers)["reason"].decode() for record in records]


async def _read_topic(settings: DataSettings, topic: str, number: int) -> list[aiokafka.ConsumerRecord]:
    async with aiokafka.AIOKafkaConsumer(
        topic, bootstrap_servers=list(settings.kafka_bootstrap), auto_offset_reset="earliest"
    ) as consumer:
        found: list[aiokafka.ConsumerRecord] = []
        async with asyncio.timeout(20):
            while len(found) < number:
                found += [r for batch in (await consumer.getmany(timeout_ms=500)).values() for r in batch]
        return found


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_poison_bytes_go_to_the_dead_letters_and_the_rest_goes_on(
    world: World, stack: AsyncExitStack, data_settings: DataSettings
) -> None:
    await world.make(new_id(), 1)  # makes the topic
    await eventually(world.outbox_is_empty)
    async with aiokafka.AIOKafkaProducer(
        bootstrap_servers=list(data_settings.kafka_bootstrap), enable_idempotence=False
    ) as producer:
        await producer.send_and_wait(world.made.TOPIC, b"\x00\xff poison", key=b"k")
    await world.make(new_id(), 2)
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    await eventually(lambda: world.has_effects(2), within=30)
    dead = await _read_topic(data_settings, f"{world.made.TOPIC}.{world.group}.dead", 1)
    assert dead[0].value == b"\x00\xff poison"
    assert "KeyError" in dict(dead[0].headers)["reason"].decode()


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_a_consumer_that_comes_back_goes_on_where_it_was(world: World) -> None:
    for run in range(3):
        async with world.bus.consuming(world.consumer(), 4):
            await world.make(new_id(), run)
            await eventually(partial(world.has_effects, run + 1), within=30)
    assert [number for _, number in await world.effects()] == [0, 1, 2]
    assert world.calls == 3


@pytest.mark.parametrize("world", ["inline"], indirect=True)
async def test_inline_nothing_is_lost_while_nobody_is_ready(world: World, stack: AsyncExitStack) -> None:
    assert isinstance(world.bus, InlineBus)
    world.bus.close_for_delivery()
    await world.make(thing_id := new_id(), 1)
    assert not await world.relay.sweep()
    assert not await world.outbox_is_empty()
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    world.bus.open_for_delivery()
    await eventually(world.outbox_is_empty)
    assert await world.effects() == [(thing_id, 1)]


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_without_a_broker_writes_succeed_and_events_wait(
    world: World, stack: AsyncExitStack, data_settings: DataSettings, health: Health
) -> None:
    nowhere = msgspec.structs.replace(data_settings, kafka_bootstrap=("127.0.0.1:1",))
    bus = await stack.enter_async_context(KafkaBus.opened(nowhere, health))
    envelope = Envelope.wrap(world.made(thing_id=new_id(), number=1), "things")
    outcomes = await bus.publish([envelope, envelope])
    assert all(isinstance(outcome, Exception) for outcome in outcomes)


async def test_the_writer_s_token_travels_with_the_event(world: World, stack: AsyncExitStack) -> None:
    seen: list[bool] = []

    async def look(delivery: Delivery[ThingMade]) -> None:
        async def exists(connection: Connection) -> bool:
            return await things.exists(connection, delivery.event.thing_id)

        seen.append(await world.db.read(exists))
        async with delivery.transaction():
            pass

    consumer = Consumer(world.group, [On(world.made, look)], world.db, world.bus)
    await stack.enter_async_context(world.bus.consuming(consumer, 4))
    for number in range(20):
        thing_id = new_id()
        with consistency.tracked(None):
            async with world.db.transaction() as tx:
                await things.insert(tx, thing_id, f"thing-{number}")
            await world.make(thing_id, number)

    async def all_seen() -> bool:
        return len(seen) >= 20

    await eventually(all_seen, within=30)
    assert all(seen)
