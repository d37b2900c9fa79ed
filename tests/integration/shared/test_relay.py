"""The relay's own work, on a bus that takes what a test lets it take."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from shared import outbox
from shared.database import Database
from shared.errors import Unavailable
from shared.events import Message
from shared.health import Health
from shared.ids import new_id
from shared.outbox import SHARDS, Outbox, Relay, shard_of
from shared.settings import DataSettings
from tests.integration.shared import things
from tests.integration.shared.things import ThingMade

Made = things.event_type("things-relay.events")


class FakeBus:
    batch = 10

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.calls = 0
        self.away = False
        self.bad: set[str] = set()
        self._in_hand: set[int] = set()

    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        self.calls += 1
        shards = {shard_of(message.key) for message in messages}
        assert not shards & self._in_hand
        self._in_hand |= shards
        await asyncio.sleep(0.005)  # others come in between
        self._in_hand -= shards
        if self.away:
            raise Unavailable("away")
        outcomes: list[Exception | None] = [
            RuntimeError("bad") if message.key in self.bad else None for message in messages
        ]
        self.taken += [m.key + m.data.decode() for m, fault in zip(messages, outcomes, strict=True) if fault is None]
        return outcomes


class World:
    def __init__(self, db: Database) -> None:
        self.db = db
        self.bus = FakeBus()
        self.relay = Relay("things", db, self.bus)
        self.outbox = Outbox("things", self.relay)

    async def write(self, *events: ThingMade) -> None:
        async with self.db.transaction() as tx:
            await self.outbox.add(tx, *events)

    async def left(self) -> list[str]:
        async with self.db.transaction() as tx:
            return [row["key"] for row in await tx.fetch("SELECT key FROM outbox ORDER BY id")]

    async def drain(self) -> None:
        while await self.relay.sweep(look=False):
            pass


@pytest.fixture
async def world(data_settings: DataSettings, health: Health) -> AsyncIterator[World]:
    async with Database.opened("things", data_settings, health) as db:
        yield World(db)


def in_order(taken: list[str], keys: list[str]) -> bool:
    """Each key's once, as they were written."""
    return all(
        (numbers := [int(entry.rpartition(":")[2].rstrip("}")) for entry in taken if entry.startswith(key)])
        == sorted(set(numbers))
        for key in keys
    )


async def test_more_than_a_transaction_takes_goes_out_in_order_with_no_shard_in_two_hands(world: World) -> None:
    ids = [new_id() for _ in range(60)]
    await world.write(*(Made(thing_id=id_, number=number) for number in range(20) for id_ in ids))
    await world.drain()
    assert len(world.bus.taken) == 20 * len(ids)
    assert in_order(world.bus.taken, [str(id_) for id_ in ids])
    assert await world.left() == []


async def test_what_the_bus_does_not_take_stays_and_only_that(world: World) -> None:
    ids = [new_id() for _ in range(20)]
    bad = [str(id_) for id_ in ids[:3]]
    world.bus.bad = set(bad)
    await world.write(*(Made(thing_id=id_, number=number) for number in range(3) for id_ in ids))
    await world.drain()
    assert await world.left() == bad * 3

    world.bus.bad = set()
    await world.write(*(Made(thing_id=id_, number=3) for id_ in ids))
    await world.drain()
    assert await world.left() == bad * 4  # they wait for their time

    world.relay._waiting_keys.clear()
    await world.relay.sweep()
    await world.drain()
    assert await world.left() == []
    assert in_order(world.bus.taken, [str(id_) for id_ in ids])
    assert len(world.bus.taken) == 80


async def test_what_comes_while_its_shard_is_in_hand_is_sent_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = world.bus.publish
    ids = [new_id() for _ in range(200)]

    async def writing(messages: list[Message]) -> list[Exception | None]:
        if not world.bus.bad:
            world.bus.bad = {message.key for message in messages}  # so that nothing of these shards goes, this time
            same = {shard_of(key) for key in world.bus.bad}
            new = (new_id() for _ in range(1000))
            await world.write(*[Made(thing_id=id_, number=0) for id_ in new if shard_of(str(id_)) in same][:40])
            await asyncio.sleep(0.1)
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", writing)
    await world.write(*(Made(thing_id=id_, number=0) for id_ in ids))
    await world.drain()
    assert set(await world.left()) == world.bus.bad


async def test_after_a_failure_no_other_transaction_begins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = world.bus.publish
    calls = 0

    async def failing(messages: list[Message]) -> list[Exception | None]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Unavailable("away")
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", failing)
    await world.write(*(Made(thing_id=new_id(), number=0) for _ in range(200)))
    with pytest.raises(Unavailable):
        await world.relay.sweep()
    assert calls == outbox._SIDE_BY_SIDE


async def test_when_the_bus_is_away_nothing_more_begins_and_nothing_is_lost(world: World) -> None:
    ids = [new_id() for _ in range(200)]  # of every shard
    assert len({shard_of(str(id_)) for id_ in ids}) == SHARDS
    await world.write(*(Made(thing_id=id_, number=0) for id_ in ids))
    world.bus.away = True
    with pytest.raises(Unavailable):
        await world.relay.sweep()
    assert world.bus.calls == outbox._SIDE_BY_SIDE
    with pytest.raises(Unavailable):
        await world.relay.sweep(careful=True)
    assert world.bus.calls == outbox._SIDE_BY_SIDE + 1
    assert await world.left() == [str(id_) for id_ in ids]
    world.bus.away = False
    await world.relay.sweep(careful=True)
    await world.drain()
    assert await world.left() == []


async def test_rows_that_nobody_was_woken_for_are_found(world: World) -> None:
    await world.write(Made(thing_id=new_id(), number=0))
    later = Relay("things", world.db, world.bus)
    await later.sweep()
    assert await world.left() == []


async def test_a_sweep_ends_in_time_though_more_and_more_comes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_POLL_SECONDS", 0.1)
    ids = [new_id() for _ in range(200)]
    publish = world.bus.publish

    async def writing(messages: list[Message]) -> list[Exception | None]:
        await world.write(*(Made(thing_id=id_, number=world.bus.calls) for id_ in ids))
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", writing)
    await world.write(*(Made(thing_id=id_, number=0) for id_ in ids))
    async with asyncio.timeout(5):
        assert await world.relay.sweep()


async def test_large_events_go_a_few_at_a_time_and_small_ones_many(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_BATCH_BYTES", 1000)  # that is 100 for each of 10 rows
    batches: list[list[int]] = []
    publish = world.bus.publish

    async def noting(messages: list[Message]) -> list[Exception | None]:
        batches.append([len(message.data) for message in messages])
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", noting)
    sizes = [*[20] * 10, *[90] * 10, *[20] * 9, 400, 400, 300, 20, 2000, 2000, 20]
    key = new_id()
    await world.write(*(Made(thing_id=key, number=number) for number in range(len(sizes))))
    async with world.db.transaction() as tx:
        for row, size in zip(await tx.fetch("SELECT id FROM outbox ORDER BY id"), sizes, strict=True):
            await tx.execute("UPDATE outbox SET data = convert_to(repeat('1', $2), 'UTF8') WHERE id = $1", row[0], size)
    await world.drain()
    assert batches == [[20] * 10, [90] * 10, [*[20] * 9, 400], [400, 300, 20, 2000], [2000], [20]]
