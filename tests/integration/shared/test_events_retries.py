"""What becomes of events that fail: rounds of waiting, the order of their key, dead letters and their redrive."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import aiokafka
import msgspec
import pytest
import structlog

from shared.bus import KafkaBus, member
from shared.consumer import Consumer, Delivery, On, clean_up_failed, parking
from shared.consumer.__main__ import run
from shared.consumer.delivery import TIMEOUTS
from shared.database import Connection, Transaction
from shared.errors import Unavailable
from shared.events import Envelope, Message
from shared.health import Health
from shared.ids import new_id
from shared.records import Fetched, decode_headers, encode_headers, sized, varint
from shared.settings import DataSettings
from shared.testing import eventually
from tests.integration.shared import worlds
from tests.integration.shared.things import ThingMade
from tests.integration.shared.worlds import World

SOON = (0.0, 0.0)


@pytest.fixture(params=["kafka", "inline"])
async def world(request: pytest.FixtureRequest, data_settings: DataSettings, health: Health) -> AsyncIterator[World]:
    async with worlds.opened(request.param, data_settings, health) as opened:
        yield opened


@pytest.fixture
async def stack(world: World) -> AsyncIterator[AsyncExitStack]:
    """Closes what a test entered, before the world it stands on."""
    async with AsyncExitStack() as opened:
        yield opened


async def test_a_handler_that_hangs_is_cancelled_and_its_event_has_another_round(
    world: World, stack: AsyncExitStack
) -> None:
    calls: list[int] = []

    async def handle(delivery: Delivery[ThingMade]) -> None:
        calls.append(delivery.event.number)
        if calls == [1]:
            async with delivery.transaction():
                await asyncio.Event().wait()
        await world.note(delivery)

    consumer = Consumer(world.group, [On(world.made, handle)], world.db, SOON, handler_seconds=0.5)
    await stack.enter_async_context(world.bus.consuming(consumer, 1))
    key = new_id()
    await world.make(key, 1)
    await world.make(key, 2)
    await eventually(lambda: world.has_effects(2), within=30)
    assert await world.effects() == [(key, 1), (key, 2)]
    assert calls.count(1) == 2  # not four times close together
    assert [
        s.value for m in TIMEOUTS.collect() for s in m.samples if s.labels.get("consumer") == f"{world.group}.handle"
    ]


async def test_a_batch_that_hangs_is_taken_apart(world: World) -> None:
    async def hang(_tx: Transaction, _events: Sequence[ThingMade]) -> None:
        await asyncio.Event().wait()

    consumer = Consumer(world.group, [On(world.made, world.note, batch=hang)], world.db, SOON, handler_seconds=0.5)
    message = Envelope.wrap(world.made(thing_id=new_id(), number=1), "things").to_message()
    record = Fetched(message.topic, 0, 0, 0, b"", message.data, message.headers)
    assert await consumer.handle_batch([record]) == [0]
    assert not await world.count("inbox")


async def test_an_event_that_always_fails_is_buried_with_reason_stack_and_origin(
    world: World, stack: AsyncExitStack
) -> None:
    world.bad = {1}
    await stack.enter_async_context(world.bus.consuming(world.consumer(SOON), 1))
    key = new_id()
    await world.make(key, 1)
    await world.make(key, 2)
    await eventually(lambda: world.has("dead_letters", 1), within=30)
    await eventually(lambda: world.has_effects(1), within=30)
    assert await world.effects() == [(key, 2)]
    async with world.db.transaction() as tx:
        letter = await tx.fetchrow("SELECT * FROM dead_letters")
    assert letter is not None
    assert letter["reason"] == "RuntimeError: no 1"
    assert 'raise RuntimeError(f"no {delivery.event.number}")' in letter["stack"]
    assert letter["attempts"] == 12  # four close together, at first and in each of two rounds
    assert (letter["topic"], letter["key"]) == (world.made.TOPIC, str(key))
    if isinstance(world.bus, KafkaBus):
        assert letter["origin"].startswith(f"{world.made.TOPIC}/")


async def test_later_events_of_a_key_wait_behind_the_one_that_failed(world: World, stack: AsyncExitStack) -> None:
    world.bad = {1}
    consumer = world.consumer((3600.0,))
    await stack.enter_async_context(world.bus.consuming(consumer, 4))
    key, other = new_id(), new_id()
    for number in (1, 2, 3):
        await world.make(key, number)
    await world.make(other, 4)
    await eventually(lambda: world.has("parked_events", 3), within=30)
    await eventually(lambda: world.has_effects(1), within=30)
    assert await world.effects() == [(other, 4)]
    world.bad.clear()
    async with world.db.transaction() as tx:
        await tx.execute("UPDATE parked_events SET due_at = now()")
    await eventually(lambda: world.has_effects(4), within=30)
    await world.make(key, 5)
    await eventually(lambda: world.has_effects(5), within=30)
    assert [number for thing, number in await world.effects() if thing == key] == [1, 2, 3, 5]
    await eventually(lambda: world.has("parked_events", 0))
    assert await world.count("dead_letters") == 0


async def test_where_order_does_not_matter_nothing_waits(world: World, stack: AsyncExitStack) -> None:
    world.bad = {1}
    await stack.enter_async_context(world.bus.consuming(world.consumer((3600.0,), ordered=False), 4))
    key = new_id()
    for number in (1, 2):
        await world.make(key, number)
    await eventually(lambda: world.has_effects(1), within=30)
    assert await world.effects() == [(key, 2)]
    assert await world.count("parked_events") == 1


async def test_a_round_that_meets_a_part_that_is_down_does_not_count(world: World) -> None:
    consumer = world.consumer((0.0,))
    world.bad = {1}
    envelope = Envelope.wrap(world.made(thing_id=new_id(), number=1), "things")
    await consumer.handle(envelope)
    world.bad.clear()
    world.faults = [Unavailable("down") for _ in range(4)]
    assert await consumer.retry_due() == 1
    assert await world.count("parked_events") == 1
    async with world.db.transaction() as tx:
        assert await tx.fetchval("UPDATE parked_events SET due_at = now() RETURNING rounds") == 1
    assert await consumer.retry_due() == 1
    assert await world.count("parked_events") == 0
    assert len(await world.effects()) == 1


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
@pytest.mark.parametrize("batch", [False, True])
async def test_an_event_for_which_a_part_stays_down_stops_its_key_only(
    world: World, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, batch: bool
) -> None:
    monkeypatch.setattr(member, "_PATIENCE_SECONDS", 0.0)
    down = {1}

    async def handle(delivery: Delivery[ThingMade]) -> None:
        if delivery.event.number in down:
            raise Unavailable("this object cannot be read")
        await world.note(delivery)

    async def handle_all(tx: Transaction, events: Sequence[ThingMade]) -> None:
        if down & {event.number for event in events}:
            raise Unavailable("one of these objects cannot be read")
        await world.note_all(tx, events)

    on = On(world.made, handle, batch=handle_all if batch else None)
    key, other = new_id(), new_id()
    for thing_id, number in ((key, 1), (key, 2), (other, 3)):
        await world.make(thing_id, number)
    await eventually(world.outbox_is_empty)
    await stack.enter_async_context(world.bus.consuming(Consumer(world.group, [on], world.db, (3600.0,)), 1))
    await eventually(lambda: world.has("parked_events", 2), within=30)
    await eventually(lambda: world.has_effects(1), within=30)
    assert await world.effects() == [(other, 3)]
    async with world.db.transaction() as tx:
        rows = await tx.fetch("SELECT rounds, attempts, reason FROM parked_events ORDER BY id")
    assert [tuple(row)[:2] for row in rows] == [(0, 0), (0, 0)]
    assert "this object" in rows[0]["reason"]
    down.clear()
    async with world.db.transaction() as tx:
        await tx.execute("UPDATE parked_events SET due_at = now()")
    await eventually(lambda: world.has_effects(3), within=30)
    assert [number for thing, number in await world.effects() if thing == key] == [1, 2]


@pytest.mark.parametrize("world", ["inline"], indirect=True)
async def test_without_rounds_nothing_is_parked_for_a_part_that_is_down(world: World) -> None:
    world.faults = [Unavailable("down") for _ in range(4)]
    with pytest.raises(Unavailable):
        await world.consumer().handle(Envelope.wrap(world.made(thing_id=new_id(), number=1), "things"), patient=False)
    assert not await world.count("parked_events")


@pytest.mark.parametrize("world", ["inline"], indirect=True)
@pytest.mark.parametrize("delays", [(3600.0,), ()])
async def test_an_error_whose_text_is_no_text_is_kept(world: World, delays: Sequence[float]) -> None:
    world.faults = [ValueError("550 \udcfc\0 unknown") for _ in range(4)]
    await world.consumer(delays).handle(Envelope.wrap(world.made(thing_id=new_id(), number=1), "things"))
    async with world.db.transaction() as tx:
        reason = await tx.fetchval(f"SELECT reason FROM {'parked_events' if delays else 'dead_letters'}")
    assert reason == "ValueError: 550 ? unknown"


@pytest.mark.parametrize("world", ["inline"], indirect=True)
async def test_an_error_that_nobody_foresaw_does_not_end_the_rounds(
    world: World, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = world.consumer(SOON)
    retry_due, calls = consumer.retry_due, 0

    async def failing() -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("nobody foresaw it")
        return await retry_due()

    monkeypatch.setattr(consumer, "retry_due", failing)
    async with world.db.transaction() as tx:
        envelope = Envelope.wrap(world.made(thing_id=new_id(), number=1), "things")
        await parking.park(tx, world.group, envelope, ordered=True)
    await stack.enter_async_context(world.bus.consuming(consumer, 4))
    await eventually(lambda: world.has_effects(1), within=30)


@pytest.mark.parametrize("world", ["inline"], indirect=True)
async def test_a_round_that_is_lost_leaves_the_others_theirs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    envelopes = Envelope.wrap_all([world.made(thing_id=new_id(), number=n) for n in range(4)], "things")
    async with world.db.transaction() as tx:
        for envelope in envelopes:
            await parking.park(tx, world.group, envelope, ordered=True)
    release = parking.release

    async def failing(connection: Connection, parked: parking.Parked) -> None:
        if parked.envelope.id == envelopes[0].id:
            raise RuntimeError("nobody foresaw it")
        await asyncio.sleep(0)  # not before the other has failed
        await release(connection, parked)

    monkeypatch.setattr(parking, "release", failing)
    with structlog.testing.capture_logs() as logs:
        assert await world.consumer(SOON).retry_due() == 4
    assert [entry["event_id"] for entry in logs if entry["event"] == "round_lost"] == [str(envelopes[0].id)]
    assert len(await world.effects()) == 4
    assert await world.count("parked_events") == 1


async def test_a_dead_letter_that_is_redriven_twice_has_one_effect(
    world: World, stack: AsyncExitStack, data_settings: DataSettings
) -> None:
    world.bad = {1}
    await stack.enter_async_context(world.bus.consuming(world.consumer(), 4))
    await world.make(new_id(), 1)
    await eventually(lambda: world.has("dead_letters", 1), within=30)
    async with world.db.transaction() as tx:
        event_id = await tx.fetchval("SELECT event_id FROM dead_letters")
        copy = await tx.fetchrow("SELECT * FROM dead_letters")

    async def command(*words: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert await run(data_settings.database_url, list(words)) == 0
        return out.getvalue()

    assert str(event_id) in await command("list")
    shown = await command("show", str(event_id))
    assert "no 1" in shown
    assert "Traceback" in shown
    assert copy is not None
    world.bad.clear()
    assert await command("redrive", str(event_id)) == "1 redriven\n"
    assert await command("redrive", str(event_id)) == "0 redriven\n"
    await eventually(lambda: world.has_effects(1), within=30)
    await eventually(lambda: world.has("parked_events", 0))
    # As when an operator puts back a letter that was redriven before and kept elsewhere.
    async with world.db.transaction() as tx:
        await tx.execute("INSERT INTO dead_letters SELECT ($1::dead_letters).*", copy)
    assert await command("redrive", "--all") == "1 redriven\n"
    await eventually(lambda: world.has("parked_events", 0))
    assert len(await world.effects()) == 1
    print(f"redriven 2 times: effects {len(await world.effects())}")


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
@pytest.mark.parametrize("batch", [False, True])
async def test_poison_bytes_are_buried_and_the_rest_goes_on(
    world: World, stack: AsyncExitStack, data_settings: DataSettings, batch: bool
) -> None:
    await world.make(new_id(), 1)  # makes the topic
    await eventually(world.outbox_is_empty)
    async with aiokafka.AIOKafkaProducer(
        bootstrap_servers=list(data_settings.kafka_bootstrap), enable_idempotence=False
    ) as producer:
        for poison in (b"\x00\xff poison", None):
            headers = [("ce_id", b"\x00\xff"), ("\x00", b"")]
            await producer.send_and_wait(world.made.TOPIC, poison, key=b"k\x00\xff", headers=headers)
    no_text, no_value = varint(1) + sized(b"\xff") + sized(b""), encode_headers([("x", None)])
    for headers_of_one in (no_text, no_value, encode_headers([("x", b"\\u0000")])):
        message = Message(world.made.TOPIC, "k", b"headers", headers_of_one)
        assert await world.bus.publish([message]) == [None]
    await world.make(new_id(), 2)
    await stack.enter_async_context(world.bus.consuming(world.consumer(batch=batch), 4))
    await eventually(lambda: world.has_effects(2), within=30)
    await eventually(lambda: world.has("dead_letters", 5), within=30)
    async with world.db.transaction() as tx:
        letters = await tx.fetch("SELECT data, type, reason FROM dead_letters ORDER BY data DESC, reason")
    assert [letter["data"] for letter in letters] == [b"headers"] * 3 + [b"\x00\xff poison", b""]
    assert {letter["type"] for letter in letters} == {"unreadable"}
    assert ["utf-8" in letter["reason"] for letter in letters] == [False, False, True, False, False]
    assert "ce_specversion" in letters[3]["reason"]
    print(f"poison records 5: buried {len(letters)}, effects of the others {len(await world.effects())}")


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
@pytest.mark.parametrize("bad", [set(), {7}])
async def test_a_batch_has_its_effects_in_one_transaction_or_is_taken_apart(
    world: World, stack: AsyncExitStack, bad: set[int]
) -> None:
    class Tripping(worlds.World):
        """Its batches fail where its single events do."""

        async def note_all(self, tx: Transaction, events: Sequence[ThingMade]) -> None:
            await super().note_all(tx, events)
            if any(event.number in self.bad for event in events):
                raise RuntimeError("one of them")

    world.__class__ = Tripping
    world.bad = bad
    key = new_id()
    for number in range(20):
        await world.make(key, number)
    await eventually(world.outbox_is_empty)
    await stack.enter_async_context(world.bus.consuming(world.consumer(ordered=False, batch=True), 4))
    good = [number for number in range(20) if number not in bad]
    await eventually(lambda: world.has_effects(len(good)), within=30)
    assert [number for _, number in await world.effects()] == good
    assert await world.count("dead_letters") == len(bad)
    assert world.batches < 20
    if not bad:
        assert world.calls == 0


@pytest.mark.parametrize("batch", [False, True])
async def test_events_whose_data_nobody_can_read_are_buried(world: World, stack: AsyncExitStack, batch: bool) -> None:
    await stack.enter_async_context(world.bus.consuming(world.consumer((3600.0,), batch=batch), 4))
    poison = [b"", b"{", b'{"number": 1, "thing_id": "\xff"}', b'{"more": ' + b"[" * 10_000]
    for number, data in enumerate(poison):
        good = Envelope.wrap(world.made(thing_id=new_id(), number=number), "things").to_message()
        assert await world.bus.publish([msgspec.structs.replace(good, data=data)]) == [None]
    await world.make(new_id(), 1)
    await eventually(lambda: world.has_effects(1), within=30)
    await eventually(lambda: world.has("dead_letters", len(poison)), within=30)
    assert not await world.count("parked_events")


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
@pytest.mark.parametrize("batch", [False, True])
async def test_records_that_a_foreign_sender_compressed_are_events_too(
    world: World, stack: AsyncExitStack, data_settings: DataSettings, batch: bool
) -> None:
    await world.make(key := new_id(), 0)
    await eventually(world.outbox_is_empty)
    async with aiokafka.AIOKafkaProducer(
        bootstrap_servers=list(data_settings.kafka_bootstrap), enable_idempotence=False, compression_type="gzip"
    ) as producer:
        for envelope in Envelope.wrap_all([world.made(thing_id=key, number=n) for n in range(1, 50)], "things"):
            sent = envelope.to_message()
            await producer.send(sent.topic, sent.data, key=sent.key.encode(), headers=decode_headers(sent.headers))
    await stack.enter_async_context(world.bus.consuming(world.consumer(batch=batch), 4))
    await eventually(lambda: world.has_effects(50), within=30)
    await world.make(key, 50)
    await eventually(lambda: world.has_effects(51), within=30)
    assert await world.effects() == [(key, number) for number in range(51)]


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_what_is_delivered_again_is_left_out_of_the_batch(world: World, stack: AsyncExitStack) -> None:
    envelopes = Envelope.wrap_all([world.made(thing_id=new_id(), number=n) for n in range(200)], "things")
    for _ in range(10):  # as by a relay that dies each time before it deletes the rows
        assert not any(await world.bus.publish([envelope.to_message() for envelope in envelopes]))
    await stack.enter_async_context(world.bus.consuming(world.consumer(batch=True), 4))
    await world.make(last := new_id(), 200)
    await eventually(lambda: world.has_effects(201), within=30)
    effects = await world.effects()
    print(f"delivered 10 times in batches: events 201, effects {len(effects)}, one by one {world.calls}")
    assert len(effects) == 201
    assert (last, 200) in effects
    assert world.calls == 0


@pytest.mark.parametrize("world", ["kafka"], indirect=True)
async def test_in_batches_only_the_key_of_a_parked_event_waits(world: World, stack: AsyncExitStack) -> None:
    key, others = new_id(), [new_id() for _ in range(5)]
    world.bad = {0}
    await world.consumer((3600.0,)).handle(Envelope.wrap(world.made(thing_id=key, number=0), "things"))
    async with world.db.transaction() as tx:
        for number in (1, 2, 3):
            await world.outbox.add(tx, *(world.made(thing_id=thing, number=number) for thing in (key, *others)))
    await eventually(world.outbox_is_empty)
    await stack.enter_async_context(world.bus.consuming(world.consumer((3600.0,), batch=True), 4))
    await eventually(lambda: world.has("parked_events", 4), within=30)
    await eventually(lambda: world.has_effects(15), within=30)
    assert {thing for thing, _ in await world.effects()} == set(others)
    world.bad.clear()
    async with world.db.transaction() as tx:
        await tx.execute("UPDATE parked_events SET due_at = now()")
    await eventually(lambda: world.has_effects(19), within=30)
    assert [number for thing, number in await world.effects() if thing == key] == [0, 1, 2, 3]


@pytest.mark.parametrize("world", ["inline"], indirect=True)
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_those_that_are_due_are_found_by_an_index(world: World, mode: str) -> None:
    async with world.db.transaction() as tx:
        await tx.execute(
            "INSERT INTO parked_events (consumer, ordered, topic, event_id, type, source, key, time, headers, data,"
            " origin, rounds, attempts, reason, stack, due_at) SELECT $1, true, 't', gen_random_uuid(), 'x', 's',"
            " n::text, now(), '{}', '{}', '', 1, 4, '', '', now() + interval '1 hour' FROM generate_series(1, 5000) n",
            world.group,
        )
        await tx.execute("ANALYZE parked_events")
        await tx.execute(f"SET LOCAL plan_cache_mode = {mode}")
        plan = [row[0] for row in await tx.fetch(f"EXPLAIN {parking._CLAIM}", world.group, 8, 300.0)]
    assert any("parked_events_due" in line for line in plan)
    assert any("Index Cond" in line and "due_at <=" in line for line in plan)


@pytest.mark.parametrize("world", ["inline"], indirect=True)
async def test_what_nobody_gives_a_round_is_buried_and_dead_letters_are_not_kept_for_ever(world: World) -> None:
    world.bad = {1, 2}
    for number, delays in ((1, (3600.0,)), (2, ())):
        await world.consumer(delays).handle(Envelope.wrap(world.made(thing_id=new_id(), number=number), "things"))
    assert (await world.count("parked_events"), await world.count("dead_letters")) == (1, 1)
    assert await clean_up_failed(world.db) == 0
    async with world.db.transaction() as tx:
        await tx.execute("UPDATE parked_events SET due_at = now() - interval '31 days'")
        await tx.execute("UPDATE dead_letters SET died_at = now() - interval '91 days'")
    assert await clean_up_failed(world.db) == 2
    assert (await world.count("parked_events"), await world.count("dead_letters")) == (0, 1)
