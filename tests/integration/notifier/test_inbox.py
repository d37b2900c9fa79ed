"""Events become notifications, once each, in whatever order they come; and what the owner does with them."""

import asyncio

from services.notifier.consumed import UserUpdated
from shared.database import Database
from shared.ids import new_id
from tests.integration.notifier.conftest import Make, Node, Person, Sink


async def test_a_registration_and_a_photo_are_told(node: Node, person: Person) -> None:
    processed = person.processed("Sun <set>")
    await node.give(person.registered(), processed, person.failed(reason="too many pixels"))
    status, inbox = await node.call("GET", "", person.id)
    assert status == 200
    assert inbox["unread"] == 3
    assert inbox["next_cursor"] is None
    assert {item["category"]: (item["title"], item["body"]) for item in inbox["items"]} == {
        "media_failed": ("“Sunset” could not be processed", "The reason: too many pixels"),
        "media_ready": ("“Sun <set>” is ready", "All sizes are made; it can be seen and shared."),
        "welcome": ("Welcome to Tenfold, Ada", "Your account is ready. Upload your first photo."),
    }
    ready = next(item for item in inbox["items"] if item["category"] == "media_ready")
    assert ready["data"] == {"media_id": str(processed.media_id), "title": "Sun <set>"}
    assert ready["read_at"] is None
    assert set(ready) == {"id", "category", "title", "body", "data", "read_at", "created_at"}


async def test_redelivered_events_have_one_effect(node: Node, person: Person, db: Database) -> None:
    envelopes = await node.give(person.registered(), person.processed())
    await asyncio.gather(*(node.give_again(envelopes) for _ in range(5)))
    assert (await node.call("GET", "", person.id))[1]["unread"] == 2
    async with db.transaction() as tx:
        assert await tx.fetchval("SELECT count(*) FROM emails WHERE user_id = $1", person.id) == 2
        assert await tx.fetchval("SELECT stream_position FROM recipients WHERE user_id = $1", person.id) == 3
        assert await tx.fetchval("SELECT count(*) FROM stream_entries WHERE user_id = $1", person.id) == 3


async def test_a_photo_may_come_before_its_owner(node: Node, sink: Sink) -> None:
    person = Person(locale="de", name="Grete")
    await node.give(person.processed())
    assert (await node.call("GET", "", person.id))[1]["unread"] == 1
    assert await sink.to(person.address) == []
    await node.give(person.registered())
    assert (await node.call("GET", "", person.id))[1]["unread"] == 2
    await sink.one_to(person.address)
    subjects: set[str] = set()
    async with asyncio.timeout(10):
        while len(subjects) < 2:
            subjects = {message["subject"] for message in await sink.to(person.address)}
    assert subjects == {"Willkommen bei Tenfold, Grete", "„Sunset“ ist fertig"}


async def test_older_news_of_a_user_do_not_undo_newer(node: Node, person: Person, db: Database) -> None:
    def updated(version: int, name: str) -> UserUpdated:
        return UserUpdated(user_id=person.id, email=person.address, display_name=name, locale="en", version=version)

    await node.give(updated(3, "Third"), updated(2, "Second"), person.registered())
    async with db.transaction() as tx:
        name = await tx.fetchval("SELECT display_name FROM recipients WHERE user_id = $1", person.id)
    assert name == "Third"
    assert (await node.call("GET", "", person.id))[1]["items"][0]["title"] == "Welcome to Tenfold, Third"


async def test_reading(node: Node, person: Person) -> None:
    await node.give(person.registered(), person.processed(), person.failed())
    items = (await node.call("GET", "", person.id))[1]["items"]
    for _ in range(2):
        assert (await node.call("PUT", f"/{items[1]['id']}/read", person.id))[0] == 204
    inbox = (await node.call("GET", "?unread=true", person.id))[1]
    assert ([item["id"] for item in inbox["items"]], inbox["unread"]) == ([items[0]["id"], items[2]["id"]], 2)
    inbox = (await node.call("GET", "?unread=false", person.id))[1]
    assert ([item["id"] for item in inbox["items"]], inbox["unread"]) == ([items[1]["id"]], 2)
    assert inbox["items"][0]["read_at"] is not None
    assert (await node.call("PUT", "/read", person.id))[0] == 204
    inbox = (await node.call("GET", "", person.id))[1]
    assert (len(inbox["items"]), inbox["unread"]) == (3, 0)


async def test_an_inbox_is_its_owner_s_alone(node: Node, person: Person) -> None:
    await node.give(person.registered())
    other = Person()
    item = (await node.call("GET", "", person.id))[1]["items"][0]
    assert (await node.call("GET", "", other.id))[1] == {"items": [], "next_cursor": None, "unread": 0}
    for user_id, notification_id in ((other.id, item["id"]), (person.id, new_id()), (person.id, "x")):
        assert (await node.call("PUT", f"/{notification_id}/read", user_id))[0] == 404
    assert (await node.call("PUT", "/read", other.id))[0] == 204
    assert (await node.call("GET", "", person.id))[1]["unread"] == 1
    async with node.http.get(f"{node.base_url}/api/v1/notifications") as response:
        assert response.status == 401


async def test_pages(node: Node, person: Person) -> None:
    await node.give(*(person.processed(f"photo {n}") for n in range(5)))
    seen: list[str] = []
    path = "?limit=2"
    while True:
        status, inbox = await node.call("GET", path, person.id)
        assert status == 200
        assert len(inbox["items"]) <= 2
        assert inbox["unread"] == 5
        seen += [item["title"] for item in inbox["items"]]
        if inbox["next_cursor"] is None:
            break
        path = f"?limit=2&cursor={inbox['next_cursor']}"
    assert sorted(seen) == [f"“photo {n}” is ready" for n in range(5)]
    assert (await node.call("GET", "?limit=0", person.id))[0] == 422
    assert (await node.call("GET", "?unread=maybe", person.id))[0] == 422
    assert (await node.call("GET", "?cursor=!", person.id))[0] == 422


async def test_two_workers_given_the_same_events_tell_once(make: Make, person: Person) -> None:
    first, second = await make(), await make()
    envelopes = await first.give(person.registered())
    await asyncio.gather(*(node.give_again(envelopes) for node in (first, second) for _ in range(4)))
    assert (await second.call("GET", "", person.id))[1]["unread"] == 1
