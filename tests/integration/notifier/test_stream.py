"""The live stream: what happens comes at once, on whichever instance it is open, and nothing is missed in between."""

import asyncio
import time

import pytest

from services.notifier import sse
from services.notifier.repository import delete_old_stream_entries
from shared.database import Database
from shared.redis import Redis
from shared.testing import eventually
from tests.integration.notifier.conftest import Make, Node, Person


async def test_events_come_as_they_happen(node: Node, person: Person) -> None:
    async with node.stream(person.id) as stream:
        processed, failed = person.processed(), person.failed()
        await node.give(person.registered(), processed, failed)
        events = await stream.take(5)
    assert stream.preamble == {"retry": "2000", "id": "0"}
    assert [event["id"] for event in events] == [1, 2, 3, 4, 5]
    assert sorted(event["event"] for event in events) == ["media", "media"] + ["notification"] * 3
    changes = {event["data"]["status"]: event["data"] for event in events if event["event"] == "media"}
    assert changes == {
        "ready": {"media_id": str(processed.media_id), "status": "ready", "title": "Sunset", "reason": None},
        "failed": {
            "media_id": str(failed.media_id), "status": "failed", "title": "Sunset", "reason": "the file is damaged",
        },
    }  # fmt: skip
    inbox = (await node.call("GET", "", person.id))[1]
    told = sorted((event["data"] for event in events if event["event"] == "notification"), key=lambda item: item["id"])
    assert told == sorted(inbox["items"], key=lambda item: item["id"])


async def test_a_stream_resumes_where_it_was_lost(node: Node, person: Person) -> None:
    await node.give(person.registered())
    async with node.stream(person.id) as stream:
        await node.give(person.processed("one"))
        seen = await stream.take(1)
    await node.give(person.processed("two"))
    async with node.stream(person.id, last_event_id=seen[-1]["id"]) as stream:
        events = await stream.take(3)
        assert [event["id"] for event in events] == [3, 4, 5]
        await node.give(person.processed("three"))
        assert [event["id"] for event in await stream.take(2)] == [6, 7]
    async with node.stream(person.id) as stream:  # without an id: from now on
        await node.give(person.processed("four"))
        assert [event["id"] for event in await stream.take(2)] == [8, 9]
    assert stream.preamble["id"] == "7"


async def test_a_client_from_the_future_starts_from_now(node: Node, person: Person) -> None:
    await node.give(person.registered())
    async with node.stream(person.id, last_event_id=10**17) as stream:
        await node.give(person.processed())
        assert [event["id"] for event in await stream.take(2)] == [2, 3]


async def test_a_foreign_id_is_refused(node: Node, person: Person) -> None:
    assert (await node.call("GET", "/stream?last_event_id=x", person.id))[0] == 422


async def test_who_was_away_too_long_gets_what_is_left(node: Node, person: Person, db: Database) -> None:
    await node.give(person.registered(), person.processed())
    async with db.transaction() as tx:
        assert await delete_old_stream_entries(tx, 3600, 10) == 0
        await tx.execute("UPDATE stream_entries SET created_at = now() - interval '2 hours'")
        assert await delete_old_stream_entries(tx, 3600, 10) == 3
    async with node.stream(person.id, last_event_id=1) as stream:
        await node.give(person.processed("new"))
        assert [event["id"] for event in await stream.take(2)] == [4, 5]


async def test_more_than_one_batch(node: Node, person: Person) -> None:
    await node.give(*(person.processed(f"{n}") for n in range(120)))
    async with node.stream(person.id, last_event_id=0) as stream:
        assert [event["id"] for event in await stream.take(240)] == list(range(1, 241))


@pytest.mark.parametrize("with_redis", [True, False], ids=["redis", "alone"])
async def test_any_instance_serves_any_user(make: Make, person: Person, *, with_redis: bool) -> None:
    # With Redis the safety net is slow, so it can only have been the wake.
    changes = {"stream_poll_seconds": 60.0} if with_redis else {"redis_url": None, "stream_poll_alone_seconds": 0.1}
    here, there = await make(**changes), await make(**changes)
    async with there.stream(person.id) as stream:
        await here.give(person.registered())  # polling says when the wakes are heard, at the latest after a second
        assert (await stream.take(1))[0]["data"]["category"] == "welcome"
        started = time.monotonic()
        await here.give(person.processed())
        await stream.take(2)
        assert time.monotonic() - started < 5


async def test_redis_away(make: Make, person: Person) -> None:
    changes = {"redis_url": "redis://127.0.0.1:1/0", "stream_poll_alone_seconds": 0.1}
    here, there = await make(**changes), await make(**changes)
    async with there.stream(person.id) as stream:
        await here.give(person.registered())
        assert (await stream.take(1))[0]["data"]["category"] == "welcome"


async def test_a_cut_subscription_is_taken_up_again(make: Make, person: Person, redis: Redis) -> None:
    async def two_are_there() -> bool:
        return bool(await redis.call("PUBSUB", "NUMSUB", "tenfold:notifier:wakes") == [b"tenfold:notifier:wakes", 2])

    here, there = await make(stream_poll_seconds=60.0), await make(stream_poll_seconds=60.0)
    async with there.stream(person.id) as stream:
        await eventually(two_are_there)
        await redis.call("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(two_are_there)
        await here.give(person.registered())
        assert (await asyncio.wait_for(stream.take(1), 15))[0]["data"]["category"] == "welcome"


async def test_a_lost_wake_is_made_up_for(make: Make, person: Person, db: Database) -> None:
    node = await make(stream_poll_seconds=0.2)
    async with node.stream(person.id) as stream:
        async with db.transaction() as tx:  # nobody announces this
            await tx.execute("INSERT INTO recipients (user_id, stream_position) VALUES ($1, 1)", person.id)
            await tx.execute(
                "INSERT INTO stream_entries (user_id, position, event, data) VALUES ($1, 1, 'media', '{}')", person.id
            )
        assert (await stream.take(1))[0]["id"] == 1


async def test_positions_are_without_gaps_under_concurrency(make: Make, person: Person) -> None:
    nodes = [await make(), await make()]
    async with nodes[0].stream(person.id) as stream:
        await asyncio.gather(*(nodes[n % 2].give(person.processed(f"{n}")) for n in range(40)))
        assert [event["id"] for event in await stream.take(80)] == list(range(1, 81))


async def test_heartbeats(make: Make, person: Person) -> None:
    node = await make(stream_heartbeat_seconds=0.05)
    async with node.stream(person.id) as stream:
        for _ in range(10):
            await stream.response.content.readuntil(sse.HEARTBEAT)


async def test_a_stream_ends_with_its_token(node: Node, person: Person) -> None:
    async with node.stream(person.id, token=node.issuer.token(person.id, 2)) as stream:
        assert await asyncio.wait_for(stream.next(), 10) is None


async def test_streams_do_not_hold_up_the_stop(node: Node, person: Person) -> None:
    async with node.stream(person.id) as stream:
        waiting = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        started = time.monotonic()
        await node.stop()
        assert time.monotonic() - started < 5
        assert await waiting is None  # a clean end, no reset


async def test_who_does_not_read_is_dropped(make: Make, person: Person) -> None:
    node = await make(stream_write_seconds=0.3)
    dropped = sse.DROPPED._value.get()
    async with node.stream(person.id) as stream:
        transport = stream.response.connection.transport  # type: ignore[union-attr]
        assert transport is not None
        transport.pause_reading()
        title = "x" * 100_000
        for _ in range(100):
            await node.give(person.processed(title))
            if sse.DROPPED._value.get() > dropped:
                break

        async def was_dropped() -> bool:
            return bool(sse.DROPPED._value.get() > dropped)

        await eventually(was_dropped)
        transport.abort()


async def test_open_streams_of_a_user_are_bounded(node: Node, person: Person) -> None:
    token = node.issuer.token(person.id)
    url = f"{node.base_url}/api/v1/notifications/stream"
    responses = [await node.http.get(url, headers={"Authorization": f"Bearer {token}"}) for _ in range(21)]
    assert [response.status for response in responses] == [200] * 20 + [429]
    assert responses[-1].headers["Retry-After"] == "10"
    for response in responses:
        response.close()
