"""The event path: outbox, relay, bus, consumer, inbox."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial

import msgspec
import pytest

from shared import consistency
from shared.bus import InlineBus, KafkaBus
from shared.consumer import Consumer, Delivery, On, clean_up
from shared.database import Connection
from shared.errors import Unavailable
from shared.events import Envelope
from shared.health import Health
from shared.ids import new_id
from shared.outbox import Relay
from shared.settings import DataSettings
from shared.testing import eventually
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
