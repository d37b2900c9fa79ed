"""Server-sent events: framing, positions, and who is woken."""

import asyncio
from uuid import uuid4

import pytest

from services.notifier import sse
from services.notifier.errors import InvalidLastEventId, TooManyStreams
from services.notifier.models import StreamEntry
from services.notifier.schemas import StreamQuery, position_after
from services.notifier.streams import Hub


def test_frames() -> None:
    assert sse.frame(StreamEntry(7, "media", '{"a": "ü\\n"}')).decode() == (
        'id: 7\nevent: media\ndata: {"a": "ü\\n"}\n\n'
    )
    assert sse.preamble(3) == b"retry: 2000\nid: 3\n\n"
    assert sse.HEARTBEAT == b":\n\n"


@pytest.mark.parametrize(
    ("header", "query", "position"),
    [(None, None, None), ("", "", None), ("12", None, 12), (None, "3", 3), ("12", "3", 12), ("0", None, 0)],
)
def test_where_a_stream_goes_on(header: str | None, query: str | None, position: int | None) -> None:
    assert position_after(header, StreamQuery(query)) == position


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 19, "٣"])
def test_foreign_ids_are_refused(given: str) -> None:
    with pytest.raises(InvalidLastEventId, match="/Last-Event-ID"):
        position_after(given, StreamQuery())
    with pytest.raises(InvalidLastEventId, match=r"\?last_event_id"):
        position_after(None, StreamQuery(given))


async def test_a_wake_reaches_the_streams_of_its_user_only() -> None:
    hub, ada, bob = Hub(), uuid4(), uuid4()
    with hub.watch(ada, 1) as first, hub.watch(ada, 1) as second, hub.watch(bob, 1) as other:
        assert sorted(hub.users()) == sorted([ada, bob])
        for watch in (first, second, other):
            assert await watch.wait(5)  # a new watch looks once
        hub.wake({ada: 2, uuid4(): 9})
        assert await first.wait(5)
        assert await second.wait(5)
        assert not await other.wait(0)
    assert hub.users() == []


async def test_what_a_stream_has_already_does_not_wake_it() -> None:
    hub, user = Hub(), uuid4()
    with hub.watch(user, 5) as watch:
        await watch.wait(5)
        hub.wake({user: 5})
        assert not await watch.wait(0)


async def test_a_wake_while_nobody_waits_is_kept() -> None:
    hub, user = Hub(), uuid4()
    with hub.watch(user, 0) as watch:
        await watch.wait(5)
        hub.wake({user: 1})
        assert await watch.wait(5)


async def test_closing_ends_streams_open_and_new() -> None:
    hub, user = Hub(), uuid4()
    with hub.watch(user, 0) as watch:
        await watch.wait(5)
        waiting = asyncio.create_task(watch.wait(60))
        await asyncio.sleep(0)
        hub.close()
        assert await waiting
        assert watch.closed
    with hub.watch(user, 0) as late:
        assert late.closed


def test_streams_of_a_user_are_bounded() -> None:
    hub, user = Hub(), uuid4()
    contexts = [hub.watch(user, 0) for _ in range(20)]
    for context in contexts:
        context.__enter__()
    with pytest.raises(TooManyStreams), hub.watch(user, 0):
        pass
    contexts[0].__exit__(None, None, None)
    with hub.watch(user, 0), hub.watch(uuid4(), 0):
        pass
