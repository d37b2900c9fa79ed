"""Campaigns on real servers: each recipient at most one email, whatever happens in between."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest

from services.notifier.campaign_repository import finish_campaigns, queue_emails
from services.notifier.consumed import UserDeleted
from shared.auth import Role
from shared.database import Database
from shared.ids import new_id
from shared.testing import eventually
from tests.backing import connect
from tests.integration.notifier.conftest import Make, Node, Person, Sink
from tests.integration.notifier.smtp_script import SmtpScript

BODY = {"name": "spring", "subject": "Spring is here", "text": "Come and see.", "audience": {"all": True}}


_ADMIN = Person()


@pytest.fixture
async def node(make: Make, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr("services.notifier.campaigns.CHUNK", 7)  # several chunks for a few people
    return await make(email_domain_per_second=10_000)


async def ask(
    node: Node, method: str, path: str, role: Role = Role.ADMIN, json: Any = None, key: str | None = None
) -> tuple[int, Any]:
    sent = {"Authorization": f"Bearer {node.issuer.token(_ADMIN.id, role=role)}"}
    if key is not None:
        sent["Idempotency-Key"] = key
    await node.replicated()
    async with node.http.request(method, f"{node.base_url}/api/v1{path}", headers=sent, json=json) as response:
        body = await response.read()
        return response.status, msgspec.json.decode(body) if response.content_type.endswith("json") else body.decode()


async def crowd(node: Node, number: int, locale: str = "en") -> list[Person]:
    people = [Person(locale=locale) for _ in range(number)]
    await node.give(*(person.registered() for person in people))
    return people


async def launch(node: Node, **changes: object) -> Any:
    status, campaign = await ask(node, "POST", "/campaigns", json=BODY | changes)
    assert status == 202, campaign
    return campaign


def reached(node: Node, campaign: Any, state: str) -> Callable[[], Awaitable[Any]]:
    async def look() -> Any:
        _, now = await ask(node, "GET", f"/campaigns/{campaign['id']}")
        return now if now["state"] == state else None

    return look


async def totals(node: Node, campaign: Any, total: int) -> bool:
    return bool((await ask(node, "GET", f"/campaigns/{campaign['id']}"))[1]["total"] == total)


async def mails(sink: Sink, people: Sequence[Person]) -> list[int]:
    """How many of the campaign's mails each of them has got."""
    found = await asyncio.gather(*(sink.to(person.address) for person in people))
    return [sum(mail["subject"] == BODY["subject"] for mail in own) for own in found]


async def test_everybody_gets_one(node: Node, sink: Sink) -> None:
    people = await crowd(node, 20)
    campaign = await launch(node)
    done = await eventually(reached(node, campaign, "done"), within=30)
    assert (done["total"], done["sent"], done["failed"]) == (20, 20, 0)
    assert await mails(sink, people) == [1] * 20
    mail = next(m for m in await sink.to(people[0].address) if m["subject"] == BODY["subject"])
    assert mail["headers"]["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert mail["headers"]["List-Unsubscribe"].strip("<>") in mail["text"]


async def test_only_the_audience_gets_it(node: Node, sink: Sink) -> None:
    english, german = await crowd(node, 3), await crowd(node, 3, "de") + await crowd(node, 1, "de-AT")
    by_language = await launch(node, audience={"locale": "de"})
    await eventually(reached(node, by_language, "done"), within=30)
    assert await mails(sink, [*english, *german]) == [0] * 3 + [1] * 4
    by_region = await launch(node, audience={"locale": "de-DE"})
    assert (await eventually(reached(node, by_region, "done"), within=30))["total"] == 0
    by_name = await launch(node, audience={"user_ids": [str(english[0].id), str(Person().id)]})
    done = await eventually(reached(node, by_name, "done"), within=30)
    assert done["total"] == 1
    assert await mails(sink, english) == [1, 0, 0]


async def test_who_unsubscribes_in_between_gets_none(node: Node, sink: Sink) -> None:
    people = await crowd(node, 10)
    first = await launch(node, audience={"user_ids": [str(people[0].id)]})
    await eventually(reached(node, first, "done"), within=30)
    mail = next(m for m in await sink.to(people[0].address) if m["subject"] == BODY["subject"])
    found = re.search(r"/api/v1(/unsubscribe/[0-9a-f-]+)", mail["headers"]["List-Unsubscribe"])
    assert found is not None

    campaign = await launch(node, send_at="2100-01-01T00:00:00Z")
    assert campaign["state"] == "scheduled"
    status, page = await ask(node, "GET", found[1], Role.USER)
    assert (status, "<form" in page) == (200, True)  # looking changes nothing
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    url = f"{node.base_url}/api/v1{found[1]}"
    for _ in range(2):  # without a token, and twice, as mail programs do it
        async with node.http.post(url, data=b"List-Unsubscribe=One-Click", headers=headers) as response:
            assert response.status == 200
    await _send_now(node, campaign)
    done = await eventually(reached(node, campaign, "done"), within=30)
    assert (done["sent"], done["suppressed"]) == (9, 1)
    assert await mails(sink, people) == [1] * 10  # the first one's is that of before
    assert (await ask(node, "POST", f"/unsubscribe/{Person().id}"))[0] == 404


async def test_a_paused_campaign_waits_and_a_cancelled_one_ends(node: Node, sink: Sink) -> None:
    people = await crowd(node, 5)
    campaign = await launch(node, send_at="2100-01-01T00:00:00Z")
    path = f"/campaigns/{campaign['id']}"
    assert (await ask(node, "POST", f"{path}/pause"))[1]["state"] == "paused"
    await _send_now(node, campaign)
    await node.give(people[0].processed())  # the sender is at work, and leaves the campaign alone
    await eventually(lambda: sink.to(people[0].address))
    assert (await ask(node, "GET", path))[1]["state"] == "paused"
    assert await mails(sink, people) == [0] * 5
    assert (await ask(node, "POST", f"{path}/resume"))[0] == 200
    await eventually(reached(node, campaign, "done"), within=30)
    assert await mails(sink, people) == [1] * 5
    assert (await ask(node, "POST", f"{path}/pause"))[0] == 409

    second = await launch(node, send_at="2100-01-01T00:00:00Z")
    assert (await ask(node, "POST", f"/campaigns/{second['id']}/cancel"))[1]["state"] == "cancelled"
    assert (await ask(node, "POST", f"/campaigns/{second['id']}/resume"))[0] == 409


@pytest.mark.parametrize("order", ["pause", "cancel", "unsubscribe"])
async def test_an_order_reaches_what_is_in_hand_already(make: Make, order: str) -> None:
    held, released = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        held.set()
        await released.wait()

    async with SmtpScript().serving() as server:
        node = await make(smtp_url=server.url)
        (person,) = await crowd(node, 1)

        async def welcomed() -> bool:
            return len(server.bodies) == 1

        await eventually(welcomed)
        server.before["RCPT"] = hold
        campaign = await launch(node)
        await held.wait()
        if order == "unsubscribe":
            connection = await connect(node.settings.database_url)
            token = await connection.fetchval("SELECT unsubscribe_token FROM recipients WHERE user_id = $1", person.id)
            await connection.close()
            assert (await ask(node, "POST", f"/unsubscribe/{token}"))[0] == 200
        else:
            assert (await ask(node, "POST", f"/campaigns/{campaign['id']}/{order}"))[0] == 200
        released.set()

        async def put_down() -> bool:
            return "QUIT" in server.commands

        await eventually(put_down)
        assert len(server.bodies) == 1
        _, now = await ask(node, "GET", f"/campaigns/{campaign['id']}")
        if order == "unsubscribe":
            assert (now["state"], now["suppressed"]) == ("done", 1)
            return
        assert (now["queued"], now["sent"]) == (1, 0)
        if order == "pause":
            await ask(node, "POST", f"/campaigns/{campaign['id']}/resume")
            done = await eventually(reached(node, campaign, "done"), within=30)
            assert done["sent"] == 1
            assert len(server.bodies) == 2


async def test_a_time_zone_that_is_gone_pauses_its_campaign_only(node: Node, sink: Sink) -> None:
    await crowd(node, 1)
    window = {"from": "00:00", "until": "23:59", "time_zone": "UTC"}
    campaign = await launch(node, window=window, send_at="2100-01-01T00:00:00Z")
    await eventually(lambda: totals(node, campaign, 1), within=30)
    connection = await connect(node.settings.database_url)
    try:
        await connection.execute("UPDATE campaigns SET time_zone = 'Europe/Nowhere', send_at = now()")
    finally:
        await connection.close()
    (other,) = await crowd(node, 1)
    await sink.one_to(other.address)
    await eventually(reached(node, campaign, "paused"), within=30)
    sound = await launch(node, audience={"user_ids": [str(other.id)]})
    await eventually(reached(node, sound, "done"), within=30)


async def test_it_is_sent_within_its_window_only(node: Node, sink: Sink) -> None:
    people = await crowd(node, 3)
    now = datetime.now(UTC)
    window = {"from": f"{now + timedelta(hours=2):%H:%M}", "until": f"{now + timedelta(hours=3):%H:%M}"}
    late = await launch(node, window=window | {"time_zone": "UTC"}, subject="later")
    window = {"from": f"{now - timedelta(hours=1):%H:%M}", "until": f"{now + timedelta(hours=1):%H:%M}"}
    await eventually(reached(node, await launch(node, window=window | {"time_zone": "Etc/UTC"}), "done"), within=30)
    assert await mails(sink, people) == [1] * 3
    assert (await ask(node, "GET", f"/campaigns/{late['id']}"))[1]["queued"] == 3
    status, problem = await ask(
        node, "POST", "/campaigns", json=BODY | {"window": window | {"time_zone": "Europe/Nowhere"}}
    )
    assert (status, problem["errors"][0]["pointer"]) == (422, "/window/time_zone")


async def test_what_is_over_keeps_its_counts(node: Node, db: Database) -> None:
    people = await crowd(node, 3)
    campaign = await launch(node)
    done = await eventually(reached(node, campaign, "done"), within=30)
    waiting = await launch(node, send_at="2100-01-01T00:00:00Z")
    await eventually(lambda: totals(node, waiting, 3))
    async with db.transaction() as tx:
        assert await finish_campaigns(tx, 10) == 1
    await node.give(UserDeleted(user_id=people[0].id))
    assert (await ask(node, "GET", f"/campaigns/{campaign['id']}"))[1] == done
    assert await totals(node, waiting, 2)


async def test_who_is_deleted_while_being_queued_gets_no_email(node: Node, db: Database) -> None:
    gone, stays = await crowd(node, 2)
    campaign = await launch(node, send_at="2100-01-01T00:00:00Z", audience={"user_ids": [str(gone.id)]})
    await eventually(lambda: totals(node, campaign, 1))
    emails = [(new_id(), person.id) for person in (gone, stays)]

    async def queue() -> None:
        async with db.transaction() as tx:
            await tx.execute("DELETE FROM emails WHERE campaign_id = $1", UUID(campaign["id"]))
            await queue_emails(tx, UUID(campaign["id"]), "campaign", emails, "example.org")

    async with db.transaction() as tx:
        await tx.execute("DELETE FROM recipients WHERE user_id = $1", gone.id)
        queueing = asyncio.create_task(queue())
        await eventually(lambda: tx.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
    await queueing
    assert await totals(node, campaign, 1)


async def test_two_nodes_and_repeated_events_send_one_each(make: Make, node: Node, sink: Sink) -> None:
    other = await make(email_domain_per_second=10_000)
    people = await crowd(node, 30)
    campaign = await launch(node)
    await eventually(reached(node, campaign, "done"), within=30)
    await other.stop()
    assert await mails(sink, people) == [1] * 30


async def test_two_workers_together_send_a_provider_no_more_than_it_takes(make: Make, sink: Sink) -> None:
    per_second, number = 10, 40
    nodes = [await make(email_domain_per_second=per_second) for _ in range(2)]
    people = await crowd(nodes[0], number)
    started = time.monotonic()
    campaign = await launch(nodes[0])
    await eventually(reached(nodes[0], campaign, "done"), within=60)
    seconds = time.monotonic() - started
    assert await mails(sink, people) == [1] * number
    # Never more than a second's worth at once, and then so many a second; a slow machine may take as long as it likes.
    assert number <= per_second * (1 + seconds), f"{number} in {seconds:.2f} s"


async def test_an_address_that_does_not_exist_is_left_out_next_time(make: Make) -> None:
    async with SmtpScript().serving() as server:
        node = await make(smtp_url=server.url)
        await crowd(node, 1)

        async def welcomed() -> bool:
            return len(server.bodies) == 1

        await eventually(welcomed)
        server.replies["RCPT"] = "550 5.1.1 no such user"
        first = await eventually(reached(node, await launch(node), "done"), within=30)
        del server.replies["RCPT"]
        second = await eventually(reached(node, await launch(node), "done"), within=30)
        assert (first["sent"], first["failed"], first["suppressed"]) == (0, 1, 0)
        assert (second["sent"], second["failed"], second["suppressed"]) == (0, 0, 1)
        assert len(server.bodies) == 1


async def test_only_administrators_send(node: Node) -> None:
    for method, path in (("POST", "/campaigns"), ("GET", "/campaigns"), ("GET", f"/campaigns/{Person().id}")):
        assert (await ask(node, method, path, Role.USER, json=BODY if method == "POST" else None))[0] == 403
    assert (await ask(node, "GET", f"/campaigns/{Person().id}"))[0] == 404
    status, problem = await ask(node, "POST", "/campaigns", json=BODY | {"audience": {}})
    assert (status, problem["errors"][0]["pointer"]) == (422, "/audience")
    once = [await ask(node, "POST", "/campaigns", json=BODY, key="k") for _ in range(2)]
    assert [status for status, _ in once] == [202, 202]
    assert once[0][1]["id"] == once[1][1]["id"]


async def _send_now(node: Node, campaign: Any) -> None:
    """As if its time had come."""
    connection = await connect(node.settings.database_url)
    try:
        await connection.execute("UPDATE campaigns SET send_at = now() WHERE id = $1", campaign["id"])
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"name": "a\0"}, "/name"),
        ({"text": "a\0\n"}, "/text"),
        ({"html": "\0"}, "/html"),
        ({"window": {"from": "09:00", "until": "18:00", "time_zone": "\0"}}, "/window/time_zone"),
        ({"send_at": "9999-12-31T23:59:59-12:00"}, "/send_at"),
        ({"send_at": "0001-01-01T00:00:00+12:00"}, "/send_at"),
    ],
    ids=["name", "text", "html", "time-zone", "too-late", "too-early"],
)
async def test_what_cannot_be_kept_is_refused_by_name(node: Node, changes: dict[str, Any], pointer: str) -> None:
    status, problem = await ask(node, "POST", "/campaigns", json=BODY | changes)
    assert (status, problem["errors"][0]["pointer"]) == (422, pointer)
