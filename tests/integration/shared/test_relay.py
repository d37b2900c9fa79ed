"""The relay's own work, on a bus that takes what a test lets it take."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import msgspec
import pytest

from shared import outbox
from shared.database import Database
from shared.errors import Unavailable
from shared.events import Message
from shared.health import Health
from shared.ids import new_id
from shared.outbox import SHARDS, Outbox, Relay, shard_of
from shared.settings import DataSettings
from shared.testing import eventually
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
    assert await world.left() == []
    assert in_order(world.bus.taken, [str(id_) for id_ in ids])
    assert len(world.bus.taken) == 80


async def test_after_a_failure_its_key_waits_with_what_was_read_already(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = world.bus.publish
    key = new_id()
    world.bus.bad = {str(key)}

    async def mending(messages: list[Message]) -> list[Exception | None]:
        outcomes = await publish(messages)
        world.bus.bad = set()
        return outcomes

    monkeypatch.setattr(world.bus, "publish", mending)
    await world.write(Made(thing_id=key, number=0), *(Made(thing_id=new_id(), number=0) for _ in range(20)))
    await world.write(Made(thing_id=key, number=1))
    await world.drain()
    assert await world.left() == [str(key)] * 2


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


async def test_what_went_before_the_bus_failed_is_not_sent_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = world.bus.publish

    async def failing(messages: list[Message]) -> list[Exception | None]:
        if world.bus.calls == 2:
            raise Unavailable("away")
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", failing)
    ids = [new_id() for _ in range(35)]
    await world.write(*(Made(thing_id=id_, number=0) for id_ in ids))
    with pytest.raises(Unavailable):
        await world.relay.sweep()
    assert await world.left() == [str(id_) for id_ in ids[20:]]


async def test_when_the_bus_is_away_nothing_more_begins_and_nothing_is_lost(world: World) -> None:
    ids = [new_id() for _ in range(200)]  # of every shard
    assert len({shard_of(str(id_)) for id_ in ids}) == SHARDS
    await world.write(*(Made(thing_id=id_, number=0) for id_ in ids))
    world.bus.away = True
    with pytest.raises(Unavailable):
        await world.relay.sweep()
    assert world.bus.calls == 1
    assert await world.left() == [str(id_) for id_ in ids]
    world.bus.away = False
    await world.relay.sweep()
    assert await world.left() == []


async def test_an_error_that_nobody_foresaw_does_not_end_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_RETRY_SECONDS", 0.01)
    publish = world.bus.publish

    async def failing(messages: list[Message]) -> list[Exception | None]:
        outcomes = await publish(messages)
        if world.bus.calls == 1:
            raise RuntimeError("nobody foresaw it")
        return outcomes

    monkeypatch.setattr(world.bus, "publish", failing)
    await world.write(Made(thing_id=new_id(), number=0))
    async with Relay.opened("things", world.db, world.bus):
        await eventually(lambda: _is_empty(world))
    assert world.bus.calls == 2


async def test_it_leaves_no_state_on_a_connection_that_it_may_share(
    data_settings: DataSettings, health: Health
) -> None:
    settings = msgspec.structs.replace(data_settings, database_pgbouncer=True, database_pool_max=1)
    async with Database.opened("things", settings, health) as db:
        async with db.transaction() as tx:
            await outbox._lock(tx, "things", [1])
            backlog = await outbox.Backlog.opened(tx, [1], [], 10, lambda *_: None)
            assert await backlog.read() == []
            assert await tx.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
        async with db.transaction() as tx:
            assert await tx.fetchval("SELECT current_setting('enable_sort')") == "on"


async def test_shards_that_another_relay_has_are_asked_for_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_POLL_SECONDS", 60.0)
    publish = world.bus.publish
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def waiting(messages: list[Message]) -> list[Exception | None]:
        begun.set()
        await go_on.wait()
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", waiting)
    id_ = new_id()
    await world.write(Made(thing_id=id_, number=0))
    async with Relay.opened("things", world.db, FakeBus()) as other, asyncio.TaskGroup() as group:
        await eventually(lambda: _is_empty(world))  # it has looked, and does so again in a minute
        await world.write(Made(thing_id=id_, number=1))
        group.create_task(world.relay.sweep(look=False))
        await begun.wait()
        async with world.db.transaction() as tx:
            await Outbox("things", other).add(tx, Made(thing_id=id_, number=2))
        await eventually(lambda: _has_taken(other))
        go_on.set()
        await eventually(lambda: _is_empty(world))
    assert len(world.bus.taken) == 1


async def test_what_commits_late_goes_before_what_came_after_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id is lower than those of rows that were sent before, and the same transaction of the relay goes on."""
    publish = world.bus.publish
    late = Made(thing_id=new_id(), number=0)
    others = [new_id() for _ in range(30)]
    async with AsyncExitStack() as stack:
        tx = await stack.enter_async_context(world.db.transaction())
        await world.outbox.add(tx, late)
        await world.write(*(Made(thing_id=id_, number=0) for id_ in others))

        async def committing(messages: list[Message]) -> list[Exception | None]:
            outcomes = await publish(messages)
            if world.bus.calls == 1:
                await stack.aclose()
                await world.write(Made(thing_id=late.thing_id, number=1))
            return outcomes

        monkeypatch.setattr(world.bus, "publish", committing)
        monkeypatch.setattr(world.relay, "_due", set(range(SHARDS)))
        await world.drain()
    assert await world.left() == []
    assert in_order(world.bus.taken, [str(id_) for id_ in [late.thing_id, *others]])
    assert len(world.bus.taken) == 32


async def test_rows_that_nobody_was_woken_for_are_found(world: World) -> None:
    await world.write(Made(thing_id=new_id(), number=0))
    later = Relay("things", world.db, world.bus)
    await later.sweep()
    assert await world.left() == []


@pytest.mark.parametrize("bound", ["_TRANSACTION_ROWS", "_POLL_SECONDS"])
async def test_a_transaction_ends_though_there_is_more(
    world: World, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(outbox, bound, 0)
    ids = [new_id() for _ in range(25)]
    await world.write(*(Made(thing_id=id_, number=0) for id_ in ids))
    assert await world.relay.sweep()
    assert await world.left() == [str(id_) for id_ in ids[10:]]
    await world.drain()
    assert await world.left() == []


async def test_rows_come_in_order_of_their_index_whatever_is_known_of_the_table(world: World) -> None:
    """To sort a backlog first, or to find a shard's rows by a bitmap, would be to read all of it for each batch."""
    await world.write(*(Made(thing_id=new_id(), number=number) for number in range(2000)))
    async with world.db.transaction() as tx:
        for analyzed in (False, True):
            if analyzed:
                await tx.execute("ANALYZE outbox")
            await outbox._lock(tx, "things", range(SHARDS))
            plan = await tx.fetch(f"EXPLAIN {outbox._BACKLOG}", [1, 2], [], 1000)
            assert "Index Scan using outbox_pkey" in plan[0][0]


async def test_large_events_go_a_few_at_a_time_and_small_ones_many(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_BATCH_BYTES", 1000)
    monkeypatch.setattr(outbox, "_SMALL_BYTES", 100)
    batches: list[list[int]] = []
    publish = world.bus.publish

    async def noting(messages: list[Message]) -> list[Exception | None]:
        batches.append([len(message.data) for message in messages])
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", noting)
    sizes = [*[20] * 10, *[100] * 10, *[20] * 9, 101, 400, 400, 300, 20, 2000, 2000, 20, 900, 20, 20]
    key = new_id()
    await world.write(*(Made(thing_id=key, number=number) for number in range(len(sizes))))
    async with world.db.transaction() as tx:
        for row, size in zip(await tx.fetch("SELECT id FROM outbox ORDER BY id"), sizes, strict=True):
            await tx.execute("UPDATE outbox SET data = convert_to(repeat('1', $2), 'UTF8') WHERE id = $1", row[0], size)
    await world.drain()
    assert batches == [
        [20] * 10,
        [100] * 10,
        [*[20] * 9, 101],
        [400, 400, 300],
        [20, 2000],
        [2000],
        [20, 900, 20, 20],
    ]


async def test_a_large_event_that_somebody_deletes_meanwhile_holds_nothing_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_SMALL_BYTES", 10)  # so that all are large
    publish = world.bus.publish
    ids = [new_id() for _ in range(30)]

    async def deleting(messages: list[Message]) -> list[Exception | None]:
        async with world.db.transaction() as tx:
            await tx.execute("DELETE FROM outbox WHERE key = ANY ($1)", [str(id_) for id_ in ids[20:29]])
        return await publish(messages)

    monkeypatch.setattr(world.bus, "publish", deleting)
    await world.write(*(Made(thing_id=id_, number=0) for id_ in ids))
    await world.drain()
    assert await world.left() == []
    assert len(world.bus.taken) == 21


@pytest.mark.parametrize("small", [True, False])
async def test_a_row_that_is_no_message_stops_its_key_only(
    world: World, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(outbox, "_BATCH_BYTES", 1)  # so that they are read one at a time
        monkeypatch.setattr(outbox, "_SMALL_BYTES", 10)
    bad, others = new_id(), [new_id() for _ in range(5)]
    await world.write(*(Made(thing_id=id_, number=number) for number in range(3) for id_ in (bad, *others)))
    async with world.db.transaction() as tx:
        first = await tx.fetchval("SELECT min(id) FROM outbox WHERE key = $1", str(bad))
        await tx.execute("UPDATE outbox SET headers = '{\"a\": 1}', record_headers = NULL WHERE id = $1", first)
    await world.drain()
    assert await world.left() == [str(bad)] * 3
    assert len(world.bus.taken) == 15
    async with world.db.transaction() as tx:
        await tx.execute("UPDATE outbox SET headers = '{}' WHERE id = $1", first)
    world.relay._waiting_keys.clear()
    await world.relay.sweep()
    assert await world.left() == []
    assert in_order(world.bus.taken, [str(id_) for id_ in (bad, *others)])
    assert len(world.bus.taken) == 18


async def _is_empty(world: World) -> bool:
    return not await world.left()


async def _has_taken(relay: Relay) -> bool:
    return bool(relay._taken)
