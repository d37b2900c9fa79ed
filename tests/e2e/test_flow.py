"""The main job: register, log in, upload a photo, get variants, be told live, in the inbox and by email."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pyvips
from aiohttp import web
from aiohttp.test_utils import TestServer

from shared.testing import eventually
from tests.e2e.conftest import Person, Platform, photo

pytestmark = pytest.mark.timeout(180)

LONG_SIDES = {"small": 256, "medium": 640, "large": 1280}


@asynccontextmanager
async def live(person: Person, last_event_id: str | None = None) -> AsyncIterator["asyncio.Queue[dict[str, Any]]"]:
    """The events of the person's stream, as they come."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    opened = asyncio.Event()
    headers = {"Authorization": f"Bearer {person.token}", "Accept": "text/event-stream"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id

    async def read() -> None:
        async with person.http.get(f"{person.base}/api/v1/notifications/stream", headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            opened.set()
            event: dict[str, Any] = {}
            async for line in response.content:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name:
                    event[name] = value
                elif "data" in event:
                    events.put_nowait({**event, "data": json.loads(event["data"])})
                    event = {}

    task = asyncio.create_task(read())
    try:
        done, _ = await asyncio.wait(
            [task, asyncio.create_task(opened.wait())], timeout=10, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            task.result()
        assert opened.is_set()
        yield events
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def next_event(events: "asyncio.Queue[dict[str, Any]]", name: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            event = await events.get()
            if event["event"] == name:
                return event


async def test_a_photo_from_upload_to_email(platform: Platform, ann: Person) -> None:
    async with live(ann) as events:
        uploaded = await ann.upload(photo(1600, 1200))
        assert uploaded.status == 202
        assert uploaded.body["status"] == "processing"
        media_id = uploaded.body["id"]
        assert uploaded.headers["Location"] == f"/api/v1/media/{media_id}"
        event = await next_event(events, "media")
        assert (event["data"]["media_id"], event["data"]["status"]) == (media_id, "ready")

    media = await ann.until(media_id, "ready")
    assert (media["width"], media["height"], media["content_type"]) == (1600, 1200, "image/jpeg")
    assert media["placeholder"]
    assert {v["name"] for v in media["variants"]} == set(LONG_SIDES)
    for variant in media["variants"]:
        # Without a header: the address is signed, so an <img> can show it.
        async with ann.http.get(ann.base + variant["url"]) as response:
            assert (response.status, response.content_type) == (200, "image/webp")
            data = await response.read()
        image = pyvips.Image.new_from_buffer(data, "")
        assert image.get("vips-loader").startswith("webp")
        assert max(image.width, image.height) == LONG_SIDES[variant["name"]] == max(variant["width"], variant["height"])
        assert len(data) == variant["bytes"]

    async def in_the_inbox() -> Any:
        inbox = (await ann.get("/api/v1/notifications")).body
        return inbox if any(media_id in json.dumps(item) for item in inbox["items"]) else None

    inbox = await eventually(in_the_inbox)
    assert inbox["unread"] == len(inbox["items"])

    async def mailed() -> list[dict[str, Any]]:
        mails = await platform.mails(ann.email)
        return mails if len(mails) == 2 else []

    for mail in await eventually(mailed, within=30):  # the welcome and the photo
        assert mail["to"] == [ann.email]
        assert mail["text"]
        assert "</html>" in mail["html"]
        assert "<b>" not in mail["html"]  # her name is text, whatever it holds


async def test_the_stream_resumes_where_it_was_cut(ann: Person) -> None:
    async with live(ann, "0") as events:
        welcome = await next_event(events, "notification")
    uploaded = await ann.upload(photo(400, 300))
    await ann.until(uploaded.body["id"], "ready")
    async with live(ann, welcome["id"]) as events:
        event = await next_event(events, "media")
        assert event["data"]["media_id"] == uploaded.body["id"]


async def test_a_webhook_is_told_and_its_signature_verifies(ann: Person) -> None:
    told: asyncio.Queue[tuple[dict[str, str], bytes]] = asyncio.Queue()

    async def answer(request: web.Request) -> web.Response:
        told.put_nowait((dict(request.headers), await request.read()))
        return web.Response(status=204)

    application = web.Application()
    application.router.add_post("/hook", answer)
    async with TestServer(application) as server:
        body = {"url": str(server.make_url("/hook")), "events": ["media.processed"]}
        made = await ann.post("/api/v1/webhooks", body)
        assert made.status == 201
        media_id = (await ann.upload(photo(320, 240))).body["id"]
        async with asyncio.timeout(60):
            headers, raw = await told.get()
    named = {name.lower(): value for name, value in headers.items()}
    # The specification, written down again: the sender uses its authors' package.
    key = base64.b64decode(made.body["secret"].removeprefix("whsec_"))
    signed = f"{named['webhook-id']}.{named['webhook-timestamp']}.".encode() + raw
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert named["webhook-signature"] == f"v1,{expected}"
    assert json.loads(raw)["data"]["media_id"] == media_id


async def test_small_photos_are_never_enlarged(ann: Person) -> None:
    uploaded = await ann.upload(photo(300, 200))
    media = await ann.until(uploaded.body["id"], "ready")
    assert {v["name"]: v["width"] for v in media["variants"]} == {"small": 256, "medium": 300, "large": 300}


async def test_what_is_no_image_is_refused_and_nothing_is_stored(ann: Person) -> None:
    for data, content_type in ((b"hello world, not an image at all", "image/jpeg"), (b"<svg/>", "image/svg+xml")):
        answer = await ann.upload(data, content_type)
        assert answer.status == 415
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert (await ann.get("/api/v1/media")).body["items"] == []
    assert (await ann.get("/api/v1/media/usage")).body["bytes"] == 0


async def test_a_truncated_photo_fails_with_a_reason_and_the_worker_goes_on(platform: Platform, ann: Person) -> None:
    broken = await ann.upload(photo()[:20_000])
    assert broken.status == 202
    failed = await ann.until(broken.body["id"], "failed")
    assert failed["failure"]
    whole = await ann.upload(photo(320, 240))
    await ann.until(whole.body["id"], "ready")

    async def told() -> bool:
        inbox = (await ann.get("/api/v1/notifications")).body
        return any(broken.body["id"] in json.dumps(item) for item in inbox["items"])

    await eventually(told)


async def test_others_see_nothing_of_it(platform: Platform, ann: Person) -> None:
    bob = await platform.person()
    media_id = (await ann.upload(photo(320, 240))).body["id"]
    await ann.until(media_id, "ready")
    for method, path in (
        ("GET", f"/api/v1/media/{media_id}"),
        ("GET", f"/api/v1/media/{media_id}/original"),
        ("DELETE", f"/api/v1/media/{media_id}"),
    ):
        assert (await bob.call(method, path)).status == 404
    assert (await bob.get("/api/v1/media")).body["items"] == []


async def test_a_deleted_photo_is_gone(ann: Person) -> None:
    media_id = (await ann.upload(photo(320, 240, seed=77))).body["id"]
    media = await ann.until(media_id, "ready")
    assert (await ann.call("DELETE", f"/api/v1/media/{media_id}")).status == 204
    assert (await ann.get(f"/api/v1/media/{media_id}")).status == 404

    async def gone_for_who_has_the_link() -> bool:  # and no token, so a replica may know of it a moment later
        async with ann.http.get(ann.base + media["variants"][0]["url"]) as response:
            return response.status == 404

    await eventually(gone_for_who_has_the_link)


async def test_an_upload_sent_again_is_one_photo(ann: Person) -> None:
    data = photo(320, 240)
    answers = [await ann.upload(data, **{"Idempotency-Key": "once"}) for _ in range(2)]
    assert [answer.status for answer in answers] == [202, 202]
    assert answers[0].body["id"] == answers[1].body["id"]
    assert len((await ann.get("/api/v1/media")).body["items"]) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/users/me"),
        ("GET", "/api/v1/sessions"),
        ("GET", "/api/v1/media"),
        ("POST", "/api/v1/media"),
        ("GET", "/api/v1/media/usage"),
        ("GET", "/api/v1/notifications"),
        ("GET", "/api/v1/notifications/stream"),
        ("PUT", "/api/v1/notifications/read"),
    ],
)
async def test_without_a_token_there_is_401(platform: Platform, method: str, path: str) -> None:
    nobody = Person(platform.stack.urls.gateway or "", platform.http)
    for authorization in ({}, {"authorization": "Bearer nonsense"}, {"x_user_id": "1"}):
        answer = await nobody.call(method, path, **authorization)
        assert answer.status == 401
        assert answer.headers["Content-Type"] == "application/problem+json"


async def test_bad_input_through_the_gateway(platform: Platform) -> None:
    base = platform.stack.urls.gateway
    async with platform.http.post(
        f"{base}/api/v1/users", data=b'{"email":', headers={"Content-Type": "application/json"}
    ) as response:
        assert response.status == 400
    async with platform.http.post(f"{base}/api/v1/users", json={"email": "a@b.de"}) as response:
        assert response.status == 422
        pointers = {error["pointer"] for error in (await response.json(content_type=None))["errors"]}
        assert pointers == {"/password", "/display_name"}
    async with platform.http.get(f"{base}/nothing/here") as response:
        assert (response.status, response.content_type) == (404, "application/problem+json")


async def test_the_front_page_and_the_index_answer(platform: Platform) -> None:
    async with platform.http.get(f"{platform.stack.urls.gateway}/") as response:
        assert (response.status, response.content_type) == (200, "text/html")
    async with platform.http.get(f"{platform.stack.urls.gateway}/api/v1") as response:
        assert (response.status, response.content_type) == (200, "application/json")
