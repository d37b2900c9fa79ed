"""Webhooks on real servers: receivers that accept, refuse, hang, redirect, or lie in a private network."""

import asyncio
import base64
import hashlib
import hmac
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import msgspec
import pytest
from aiohttp import web
from aiohttp.abc import ResolveResult
from aiohttp.test_utils import TestServer

from devstack.ports import free_port
from services.notifier.consumed import UserDeleted
from shared.testing import eventually
from tests.backing import connect
from tests.integration.notifier.conftest import Make, Node, Person

LOOPBACK = ("127.0.0.0/8", "::1/128")


@dataclass
class Receiver:
    """An HTTP server of somebody's; it answers with the next of `answers`, then with 204."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hang: asyncio.Event | None = None

    async def answer(self, request: web.Request) -> web.Response:
        self.received.append((dict(request.headers), await request.read()))
        if self.hang is not None:
            await self.hang.wait()
        status = self.answers.pop(0) if self.answers else 204
        return web.Response(status=status, headers={"Location": "http://127.0.0.1:1/"} if status == 302 else {})

    async def has(self, count: int) -> bool:
        return len(self.received) >= count


@asynccontextmanager
async def receiving(*answers: int) -> AsyncIterator[Receiver]:
    receiver = Receiver(answers=list(answers))
    application = web.Application()
    application.router.add_post("/hook", receiver.answer)
    async with TestServer(application) as server:
        receiver.url = str(server.make_url("/hook"))
        yield receiver


@pytest.fixture
async def node(make: Make) -> Node:
    return await make(
        webhook_private_networks=LOOPBACK, webhook_poll_seconds=0.1, webhook_retry_seconds=(0.01, 0.02, 0.03)
    )


async def ask(node: Node, method: str, path: str, who: Person, **kwargs: Any) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {node.issuer.token(who.id)}", **kwargs.pop("headers", {})}
    await node.replicated()
    async with node.http.request(method, f"{node.base_url}/api/v1{path}", headers=headers, **kwargs) as response:
        body = await response.read()
        return response.status, msgspec.json.decode(body) if body else None


async def made(node: Node, who: Person, url: str, *events: str) -> Any:
    status, webhook = await ask(
        node, "POST", "/webhooks", who, json={"url": url, "events": list(events) or ["media.processed"]}
    )
    assert status == 201, webhook
    return webhook


async def deliveries(node: Node, who: Person, webhook: Any) -> list[Any]:
    status, page = await ask(node, "GET", f"/webhooks/{webhook['id']}/deliveries", who)
    assert status == 200
    items: list[Any] = page["items"]
    return items


def in_state(node: Node, who: Person, webhook: Any, state: str) -> Callable[[], Any]:
    async def reached() -> Any:
        found = await deliveries(node, who, webhook)
        return found if found and all(d["state"] == state for d in found) else None

    return reached


def verify(secret: str, headers: dict[str, str], body: bytes) -> None:
    """The specification, written down again."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    named = {name.lower(): value for name, value in headers.items()}
    signed = f"{named['webhook-id']}.{named['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert f"v1,{expected}" in named["webhook-signature"].split(" ")


async def test_an_event_is_delivered_signed_and_once(node: Node, person: Person) -> None:
    async with receiving() as receiver:
        webhook = await made(node, person, receiver.url)
        event = person.processed("Sunset")
        envelopes = await node.give(event)
        await node.give_again(envelopes)
        await eventually(lambda: receiver.has(1))
        headers, body = receiver.received[0]
        verify(webhook["secret"], headers, body)
        told = msgspec.json.decode(body)
        assert told["type"] == "media.processed"
        assert told["data"]["media_id"] == str(event.media_id)
        log = await eventually(in_state(node, person, webhook, "delivered"))
        assert [(d["attempts"], d["last_status"]) for d in log] == [(1, 204)]
        assert len(receiver.received) == 1


async def test_only_what_is_subscribed_by_its_owner_is_sent(node: Node, person: Person) -> None:
    async with receiving() as receiver:
        await made(node, person, receiver.url, "media.failed")
        await node.give(person.processed(), Person().failed(), person.failed())
        await eventually(lambda: receiver.has(1))
        assert [msgspec.json.decode(body)["type"] for _, body in receiver.received] == ["media.failed"]


async def test_what_fails_is_tried_again_under_the_same_id(node: Node, person: Person) -> None:
    async with receiving(500, 302) as receiver:
        webhook = await made(node, person, receiver.url)
        await node.give(person.processed())
        log = await eventually(in_state(node, person, webhook, "delivered"))
        assert log[0]["attempts"] == 3
        ids = {headers["webhook-id"] for headers, _ in receiver.received}
        assert len(receiver.received) == 3
        assert len(ids) == 1


async def test_who_takes_nothing_for_long_is_disabled_and_told(node: Node, person: Person) -> None:
    async with receiving(*[500] * 50) as receiver:
        webhook = await made(node, person, receiver.url)
        for _ in range(3):
            await node.give(person.processed())
            await eventually(in_state(node, person, webhook, "failed"))

        async def disabled() -> bool:
            _, page = await ask(node, "GET", "/webhooks", person)
            return bool(page["items"][0]["disabled"])

        await eventually(disabled)
        before = len(receiver.received)
        await node.give(person.processed())
        _, inbox = await ask(node, "GET", "/notifications", person)
        assert [n["category"] for n in inbox["items"]].count("webhook_disabled") == 1
        assert len(receiver.received) == before


async def test_who_is_gone_is_disabled_at_once(node: Node, person: Person) -> None:
    async with receiving(410) as receiver:
        webhook = await made(node, person, receiver.url)
        await node.give(person.processed())
        await eventually(in_state(node, person, webhook, "failed"))
        _, page = await ask(node, "GET", "/webhooks", person)
        assert page["items"][0]["disabled"]
        (delivery,) = await deliveries(node, person, webhook)
        path = f"/webhooks/{webhook['id']}/deliveries/{delivery['id']}/redeliver"
        assert (await ask(node, "POST", path, person))[0] == 409
        assert len(receiver.received) == 1


async def test_a_delivery_can_be_sent_again_by_its_owner(node: Node, person: Person) -> None:
    async with receiving() as receiver:
        webhook = await made(node, person, receiver.url)
        await node.give(person.processed())
        log = await eventually(in_state(node, person, webhook, "delivered"))
        path = f"/webhooks/{webhook['id']}/deliveries/{log[0]['id']}/redeliver"
        assert (await ask(node, "POST", path, Person()))[0] == 404
        assert (await ask(node, "POST", path, person))[0] == 202
        await eventually(lambda: receiver.has(2))
        assert receiver.received[0][0]["webhook-id"] == receiver.received[1][0]["webhook-id"]


async def test_a_receiver_that_hangs_is_given_up(make: Make, person: Person) -> None:
    node = await make(
        webhook_private_networks=LOOPBACK,
        webhook_poll_seconds=0.1,
        webhook_timeout_seconds=0.3,
        webhook_retry_seconds=(),
    )
    async with receiving() as receiver:
        receiver.hang = asyncio.Event()
        webhook = await made(node, person, receiver.url)
        await node.give(person.processed())
        log = await eventually(in_state(node, person, webhook, "failed"))
        receiver.hang.set()
        assert (log[0]["last_status"], log[0]["last_error"]) == (None, "no answer in time")


async def test_receivers_that_hang_delay_nobody_else(make: Make, person: Person) -> None:
    """Of one webhook two deliveries are in hand, of one owner four; all others wait for them."""
    node = await make(webhook_private_networks=LOOPBACK, webhook_poll_seconds=0.1, webhook_concurrency=5)
    async with receiving() as receiver, receiving() as others:
        receiver.hang = asyncio.Event()
        webhooks = [await made(node, person, receiver.url) for _ in range(3)]
        for _ in range(5):
            await node.give(person.processed())
        await eventually(lambda: receiver.has(4))
        other = Person()
        await made(node, other, others.url)
        await node.give(other.processed())
        await eventually(lambda: others.has(1))
        assert len(receiver.received) == 4
        receiver.hang.set()
        for webhook in webhooks:
            log = await eventually(in_state(node, person, webhook, "delivered"))
            assert [delivery["attempts"] for delivery in log] == [1] * 5


async def test_a_webhook_that_hangs_leaves_its_owner_others(make: Make, person: Person) -> None:
    node = await make(webhook_private_networks=LOOPBACK, webhook_poll_seconds=0.1, webhook_concurrency=5)
    async with receiving() as receiver, receiving() as others:
        receiver.hang = asyncio.Event()
        await made(node, person, receiver.url)
        await made(node, person, others.url)
        for _ in range(5):
            await node.give(person.processed())
        await eventually(lambda: others.has(5))
        assert len(receiver.received) == 2
        receiver.hang.set()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "127.1", "2130706433"])
async def test_private_networks_are_never_reached(make: Make, person: Person, host: str) -> None:
    # Plain HTTP is allowed by naming a network that the receiver is not in.
    node = await make(webhook_private_networks=("192.0.2.0/24",), webhook_poll_seconds=0.1, webhook_retry_seconds=())
    async with receiving() as receiver:
        port = receiver.url.rsplit(":", 1)[1].split("/")[0]
        webhook = await made(node, person, f"http://{host}:{port}/hook")
        await node.give(person.processed())
        log = await eventually(in_state(node, person, webhook, "failed"))
        assert receiver.received == []
        assert log[0]["last_status"] is None


@asynccontextmanager
async def public_and_private(answer: Callable[[web.Request], Any]) -> AsyncIterator[tuple[int, list[str]]]:
    """A port where `answer` stands for the public network, on ::1, and something private listens on 127.0.0.1; what
    that receives is listed."""
    inside: list[str] = []

    async def private(request: web.Request) -> web.Response:
        inside.append(request.path)
        return web.Response()

    runners = []
    port = free_port()
    for host, handler in (("::1", answer), ("127.0.0.1", private)):
        application = web.Application()
        application.router.add_route("*", "/{rest:.*}", handler)
        runners.append(runner := web.AppRunner(application))
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
    try:
        yield port, inside
    finally:
        for runner in runners:
            await runner.cleanup()


async def test_a_name_that_turns_to_a_private_address_is_not_followed(
    make: Make, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = ["::1", "127.0.0.1"]
    received: list[str] = []

    async def resolve(_self: object, host: str, port: int = 0, family: object = None) -> list[ResolveResult]:
        address = turns.pop(0)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)
        ]

    async def public(request: web.Request) -> web.Response:
        received.append(request.path)
        return web.Response(status=500)  # so that there is a second attempt

    monkeypatch.setattr("aiohttp.resolver.DefaultResolver.resolve", resolve)
    node = await make(webhook_private_networks=("::1/128",), webhook_poll_seconds=0.1, webhook_retry_seconds=(0.01,))
    async with public_and_private(public) as (port, inside):
        webhook = await made(node, person, f"http://rebinding.example:{port}/hook")
        await node.give(person.processed())
        log = await eventually(in_state(node, person, webhook, "failed"))
        assert (received, inside, turns) == (["/hook"], [], [])
        assert log[0]["last_error"] == "the URL leads into a private network"


async def test_a_redirect_is_not_followed(make: Make, person: Person) -> None:
    node = await make(webhook_private_networks=("::1/128",), webhook_poll_seconds=0.1, webhook_retry_seconds=())

    async def elsewhere(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": f"http://127.0.0.1:{request.url.port}/admin"})

    async with public_and_private(elsewhere) as (port, inside):
        webhook = await made(node, person, f"http://[::1]:{port}/hook")
        await node.give(person.processed())
        log = await eventually(in_state(node, person, webhook, "failed"))
        assert (log[0]["last_status"], inside) == (307, [])


async def test_only_tls_is_taken_where_no_private_network_is_allowed(make: Make, person: Person) -> None:
    node = await make()
    status, problem = await ask(
        node, "POST", "/webhooks", person, json={"url": "http://example.org/", "events": ["media.failed"]}
    )
    assert (status, problem["errors"][0]["pointer"]) == (422, "/url")


async def test_the_secret_is_told_once_and_each_sees_their_own(node: Node, person: Person) -> None:
    webhook = await made(node, person, "https://example.org/hook")
    assert webhook["secret"].startswith("whsec_")
    _, page = await ask(node, "GET", "/webhooks", person)
    assert [w["id"] for w in page["items"]] == [webhook["id"]]
    assert "secret" not in page["items"][0]
    other = Person()
    assert (await ask(node, "GET", "/webhooks", other))[1]["items"] == []
    assert (await ask(node, "DELETE", f"/webhooks/{webhook['id']}", other))[0] == 404
    assert (await ask(node, "GET", f"/webhooks/{webhook['id']}/deliveries", other))[0] == 404
    assert (await ask(node, "DELETE", f"/webhooks/{webhook['id']}", person))[0] == 204
    assert (await ask(node, "GET", "/webhooks", person))[1]["items"] == []


async def test_a_creation_sent_again_makes_one_webhook(node: Node, person: Person) -> None:
    body = {"url": "https://example.org/hook", "events": ["media.failed"]}
    answers = [
        await ask(node, "POST", "/webhooks", person, json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert len((await ask(node, "GET", "/webhooks", person))[1]["items"]) == 1


async def test_there_is_a_limit(node: Node, person: Person) -> None:
    for _ in range(20):
        await made(node, person, "https://example.org/hook")
    status, problem = await ask(
        node, "POST", "/webhooks", person, json={"url": "https://example.org/", "events": ["media.failed"]}
    )
    assert (status, problem["type"]) == (409, "urn:tenfold:error:too-many-webhooks")


async def test_email_that_is_not_wanted_is_not_sent(node: Node, person: Person) -> None:
    status, body = await ask(node, "GET", "/notification-preferences", person)
    assert (status, set(body["email"].values())) == (200, {True})
    status, body = await ask(node, "PUT", "/notification-preferences", person, json={"email": {"media_ready": False}})
    assert (status, body["email"]["media_ready"], body["email"]["welcome"]) == (200, False, True)
    await node.give(person.registered(), person.processed(), person.failed())
    assert (await ask(node, "GET", "/notification-preferences", person))[1] == body
    _, inbox = await ask(node, "GET", "/notifications", person)
    assert len(inbox["items"]) == 3
    assert await _categories(node, person.id) == ["media_failed", "welcome"]


async def test_who_is_deleted_leaves_and_brings_back_nothing(node: Node, person: Person) -> None:
    await node.give(person.registered())
    await made(node, person, "https://example.org/hook")
    await ask(node, "PUT", "/notification-preferences", person, json={"email": {"media_ready": False}})
    await node.give(UserDeleted(user_id=person.id))
    body = {"url": "https://example.org/hook", "events": ["media.failed"]}
    assert (await ask(node, "GET", "/webhooks", person))[1]["items"] == []
    assert (await ask(node, "POST", "/webhooks", person, json=body))[0] == 401
    assert (await ask(node, "PUT", "/notification-preferences", person, json={"email": {}}))[0] == 401


async def test_an_unknown_category_is_named(node: Node, person: Person) -> None:
    for category in ("spam", "reset_password"):  # one that nobody knows, and one that nobody may refuse
        body = {"email": {category: False}}
        status, problem = await ask(node, "PUT", "/notification-preferences", person, json=body)
        assert (status, problem["errors"][0]["pointer"]) == (422, f"/email/{category}")


async def _categories(node: Node, user_id: UUID) -> list[str]:

    connection = await connect(node.settings.database_url)
    try:
        rows = await connection.fetch("SELECT category FROM emails WHERE user_id = $1 ORDER BY category", user_id)
    finally:
        await connection.close()
    return [row["category"] for row in rows]
