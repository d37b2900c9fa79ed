"""The event path: outbox, relay, bus, consumer, inbox."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial

import msgspec
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from shared import consistency, http_client, outbox
from shared.bus import InlineBus, KafkaBus, member
from shared.bus.fetching import FetchingConsumer
from shared.bus.lag import LAG
from shared.consumer import Consumer, Delivery, On, clean_up, parking
from shared.database import Connection, Database
from shared.errors import Unavailable
from shared.events import Envelope, Message
from shared.health import Health
from shared.ids import new_id
from shared.outbox import BACKLOG, Outbox, Relay
from shared.runner import Process
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import Backing
from tests.integration.shared import things, worlds
from tests.integration.shared.things import ThingMade
from tests.integration.shared.worlds import World


@pytest.fixture(params=["kafka", "inline"])
async def world(request: pytest.FixtureRequest, data_settings: DataSettings, health: Health) -> AsyncIterator[World]:
    async with worlds.opened(request.param, data_settings, health) as opened:
        yield opened


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
    print(f"delivered 10 times: effects {len(await world.effects())}")
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

    async def refused() -> bool:
        try:
            await world.relay.sweep()
        except Unavailable:
            return True
        return False  # the relay that runs had the shard at that moment

    await eventually(refused)
    assert not await world.outbox_is_empty()
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    world.bus.open_for_delivery()
    await eventually(world.outbox_is_empty)
    assert await world.effects() == [(thing_id, 1)]


async def test_inline_an_event_whose_consumer_leaves_at_the_stop_comes_again(data_settings: DataSettings) -> None:
    """The relay outlives the consumers, and one of them has an event in hand while the other leaves."""
    settings = msgspec.structs.replace(data_settings, bus="inline")
    begun, go_on = asyncio.Event(), asyncio.Event()
    seen: list[str] = []

    async def first(delivery: Delivery[ThingMade]) -> None:
        begun.set()
        await go_on.wait()
        async with delivery.transaction():
            seen.append("first")

    async def second(delivery: Delivery[ThingMade]) -> None:
        async with delivery.transaction():
            seen.append("second")

    async def start(stack: AsyncExitStack) -> tuple[Database, Outbox, InlineBus]:
        process = Process(stack, await stack.enter_async_context(http_client.session()))
        db = await process.enter(Database.opened("things", settings, process.health))
        bus = await process.bus(settings)
        assert isinstance(bus, InlineBus)
        made = Outbox("things", await process.enter(Relay.opened("things", db, bus)))
        for handle in (first, second):
            await process.enter(bus.consuming(Consumer(handle.__name__, [On(ThingMade, handle)], db), 8))
        process.deliver()
        return db, made, bus

    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        db, made, bus = await start(stack)
        async with db.transaction() as tx:
            await made.add(tx, ThingMade(thing_id=new_id(), number=1))
        await begun.wait()
        stop = group.create_task(stack.aclose())

        async def have_left() -> bool:
            return not bus._consumers

        await eventually(have_left)
        go_on.set()
        await stop
    assert seen == ["first"]

    async with AsyncExitStack() as stack:
        db, *_ = await start(stack)

        async def delivered() -> bool:
            async with db.transaction() as tx:
                return await things.outbox_size(tx) == 0

        await eventually(delivered)
    assert seen == ["first", "second"]


@pytest.mark.parametrize("world", ["inline"], indirect=True)
async def test_inline_a_round_in_hand_at_the_stop_is_finished(world: World) -> None:
    assert isinstance(world.bus, InlineBus)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handle(delivery: Delivery[ThingMade]) -> None:
        begun.set()
        await go_on.wait()
        await world.note(delivery)

    envelope = Envelope.wrap(world.made(thing_id=new_id(), number=1), "things")
    async with world.db.transaction() as tx:
        await parking.park(tx, world.group, envelope, ordered=True)
    consumer = Consumer(world.group, [On(world.made, handle)], world.db)
    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        await stack.enter_async_context(world.bus.consuming(consumer, 4))
        await begun.wait()
        world.bus.close_for_delivery()
        leaving = group.create_task(stack.aclose())
        await asyncio.sleep(0)  # it has begun to leave
        go_on.set()
        await leaving
    assert len(await world.effects()) == 1


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_without_a_broker_writes_succeed_and_events_wait(
    world: World, stack: AsyncExitStack, data_settings: DataSettings, health: Health
) -> None:
    nowhere = msgspec.structs.replace(data_settings, kafka_bootstrap=("127.0.0.1:1",))
    bus = await stack.enter_async_context(KafkaBus.opened(nowhere, health))
    envelope = Envelope.wrap(world.made(thing_id=new_id(), number=1), "things")
    with pytest.raises(Unavailable):
        await bus.publish([envelope.to_message()] * 2)


async def test_the_writer_s_token_travels_with_the_event(world: World, stack: AsyncExitStack) -> None:
    seen: list[bool] = []

    async def look(delivery: Delivery[ThingMade]) -> None:
        async def exists(connection: Connection) -> bool:
            return await things.exists(connection, delivery.event.thing_id)

        seen.append(await world.db.read(exists))
        async with delivery.transaction():
            pass

    consumer = Consumer(world.group, [On(world.made, look)], world.db)
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


async def test_a_transaction_that_commits_late_is_delivered(world: World, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    first, late = new_id(), new_id()
    async with world.db.transaction() as tx:
        await world.outbox.add(tx, world.made(thing_id=late, number=1))  # the lower row id
        await world.make(first, 2)
        await eventually(lambda: world.has_effects(1), within=30)
    await eventually(lambda: world.has_effects(2), within=30)
    print(f"committed late: delivered {len(await world.effects())} of 2")
    assert await world.effects() == [(first, 2), (late, 1)]


async def test_rows_that_earlier_code_writes_keep_their_place(world: World, stack: AsyncExitStack) -> None:
    thing_id = new_id()
    async with world.db.transaction() as tx:
        for number in range(6):
            await world.outbox.add(tx, world.made(thing_id=thing_id, number=number))
        await tx.execute("UPDATE outbox SET record_headers = NULL WHERE id % 2 = 0")
        before = {row["event_id"] for row in await tx.fetch("SELECT event_id FROM outbox")}
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    await eventually(lambda: world.has_effects(6), within=30)
    assert await world.effects() == [(thing_id, number) for number in range(6)]
    async with world.db.transaction() as tx:
        assert {row["event_id"] for row in await tx.fetch("SELECT event_id FROM inbox")} == before


async def test_what_the_relay_holds_at_a_time_is_bounded_in_bytes(
    world: World, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    publish = world.bus.publish

    async def counting(messages: list[Message]) -> list[Exception | None]:
        held.append(sum(len(message.data) for message in messages))
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", counting)
    monkeypatch.setattr(outbox, "_BATCH_BYTES", 100)
    monkeypatch.setattr(outbox, "_SMALL_BYTES", 10)
    thing_id = new_id()
    async with world.db.transaction() as tx:
        await world.outbox.add(tx, *(world.made(thing_id=thing_id, number=number) for number in range(10)))
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    await eventually(lambda: world.has_effects(10), within=30)
    assert await world.effects() == [(thing_id, number) for number in range(10)]
    assert max(held) < 100 + 100  # one event is about 60 bytes


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_only_the_key_whose_event_cannot_be_sent_stops(world: World) -> None:
    bad, good = new_id(), new_id()
    async with world.db.transaction() as tx:
        await world.outbox.add(tx, *(world.made(thing_id=bad, number=number) for number in (1, 2)))
        await tx.execute("UPDATE outbox SET data = convert_to(repeat('x', 2000000), 'UTF8') WHERE id = 1")
        await world.outbox.add(tx, *(world.made(thing_id=good, number=number) for number in range(50)))

    async def only_bad() -> bool:
        async with world.db.transaction() as tx:
            keys = [row["key"] for row in await tx.fetch("SELECT key FROM outbox ORDER BY id")]
        return keys == [str(bad)] * 2

    await eventually(only_bad, within=30)

    async def alarmed() -> bool:
        return [s.value for m in BACKLOG.collect() for s in m.samples if s.labels["service"] == "things"] == [2]

    await eventually(alarmed)


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_only_the_key_whose_event_the_broker_refuses_stops(
    world: World, backing: Backing, data_settings: DataSettings
) -> None:
    if backing.broker != "apache":
        pytest.skip("the stand-in has no limit of its own for a topic")
    admin = AIOKafkaAdminClient(bootstrap_servers=list(data_settings.kafka_bootstrap))
    await admin.start()
    try:
        limit = {"max.message.bytes": "50000"}
        await admin.create_topics([NewTopic(world.made.TOPIC, 1, 1, topic_configs=limit)])
    finally:
        await admin.close()
    envelopes = Envelope.wrap_all([world.made(thing_id=new_id(), number=n) for n in range(100)], "things")
    messages = [envelope.to_message() for envelope in envelopes]
    messages[50] = msgspec.structs.replace(messages[50], data=b"x" * 60_000)
    refused = await world.bus.publish(messages)
    assert all(refused)  # one partition, one batch
    outcomes = await world.bus.publish(messages)
    assert [n for n, outcome in enumerate(outcomes) if outcome is not None] == [50]
    assert not any(await world.bus.publish(messages[:50]))  # and these are batches again


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_a_consumer_that_gets_nothing_is_made_anew(
    backing: Backing, world: World, data_settings: DataSettings, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backing.broker != "apache":
        pytest.skip("needs Apache Kafka: the stand-in answers a member that leaves with what the client cannot read")
    made: list[FetchingConsumer] = []

    class Stuck(FetchingConsumer):
        """The first one that joins never gets a record, as after a broker's restart (aiokafka 1154)."""

        async def getmany(self, *partitions: object, timeout_ms: int = 0, max_records: int | None = None) -> object:
            if self not in made:
                made.append(self)
            if self is made[0]:
                await asyncio.sleep(timeout_ms / 1000)
                return {}
            return await super().getmany(*partitions, timeout_ms=timeout_ms, max_records=max_records)

    monkeypatch.setattr(member, "FetchingConsumer", Stuck)
    settings = msgspec.structs.replace(data_settings, kafka_stall_seconds=1)
    await world.make(new_id(), 1)
    async with KafkaBus.opened(settings, health) as bus, bus.consuming(world.consumer(), 4):
        await eventually(lambda: world.has_effects(1), within=60)
    assert len(made) == 2
    assert [s.value for m in LAG.collect() for s in m.samples if s.labels["group"] == world.group]


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_a_slow_key_holds_back_no_other_and_is_repeated_after_a_crash(
    world: World, stack: AsyncExitStack
) -> None:
    slow, begun = new_id(), asyncio.Event()

    async def handle(delivery: Delivery[ThingMade]) -> None:
        if delivery.event.thing_id == slow and not begun.is_set():
            begun.set()
            await asyncio.Event().wait()
        await world.note(delivery)

    consumer = Consumer(world.group, [On(world.made, handle)], world.db)
    await world.make(slow, 0)
    await eventually(world.outbox_is_empty)
    for number in range(1, 30):
        await world.make(new_id(), number)
    crashing = AsyncExitStack()
    await crashing.enter_async_context(world.bus.consuming(consumer, 4))
    await eventually(lambda: world.has_effects(29), within=30)
    assert begun.is_set()
    await crashing.aclose()  # gives up what is still in hand after the time allowed
    await stack.enter_async_context(world.bus.consuming(consumer, 4))
    await eventually(lambda: world.has_effects(30), within=30)
    assert sorted(number for _, number in await world.effects()) == list(range(30))
