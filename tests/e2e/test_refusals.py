"""How every endpoint refuses, through the gateway: `endpoints.py` says how."""

import re
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.conftest import Person, Platform, administrator, photo
from tests.e2e.endpoints import ENDPOINTS, NOBODY, Endpoint
from tests.serving import Answer

pytestmark = pytest.mark.parametrize("platform", [1], ids=["stage 1"], indirect=True)


@dataclass
class Cast:
    """`ann` has one of each thing, whose ids are `hers`; `bob` has nothing."""

    ann: Person
    bob: Person
    admin: Person
    hers: dict[str, str]

    async def ask(self, who: Person, endpoint: str, ids: dict[str, str], query: str = "", **more: Any) -> Answer:
        method, path = endpoint.split()
        return await who.call(method, re.sub(r"{(\w+)}", lambda name: ids[name[1]], path) + query, **more)


@pytest.fixture(scope="session")
async def cast(platform: Platform) -> Cast:
    ann, bob, admin = await platform.person(), await platform.person(), await administrator(platform)
    media = await ann.until((await ann.upload(photo(64, 48))).body["id"], "ready")
    upload = await ann.post("/api/v1/media/uploads", {"content_type": "image/png", "bytes": 9})
    webhook = await ann.post("/api/v1/webhooks", {"url": f"{ann.base}/", "events": ["media.failed"]})
    hers = {
        "media_id": media["id"],
        "name": "small",
        "upload_id": upload.body["id"],
        "webhook_id": webhook.body["id"],
        "session_id": (await ann.get("/api/v1/sessions")).body["items"][0]["id"],
        "notification_id": (await ann.get("/api/v1/notifications")).body["items"][0]["id"],
        "user_id": NOBODY,
        "campaign_id": NOBODY,
        "delivery_id": NOBODY,
        "token": NOBODY,
    }
    return Cast(ann, bob, admin, hers)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_refuses(cast: Cast, endpoint: str) -> None:
    expected = ENDPOINTS[endpoint]
    for status in sorted(expected.refuses):
        for answer in await attempts(cast, endpoint, expected, status):
            assert answer.status == status, answer
            if not endpoint.startswith("HEAD"):
                assert answer.headers["Content-Type"] == "application/problem+json"
                assert answer.body["status"] == status


async def attempts(cast: Cast, endpoint: str, expected: Endpoint, status: int) -> list[Answer]:
    who = cast.admin if 403 in expected.refuses else cast.ann
    body = expected.body
    if status == 401:
        bad: tuple[dict[str, str], ...] = ({}, {"authorization": "Bearer nonsense"}, {"x_user_id": cast.ann.id})
        nobody = Person(cast.ann.base, cast.ann.http)
        return [await cast.ask(nobody, endpoint, cast.hers, json=body, **headers) for headers in bad]
    if status == 403:
        return [await cast.ask(cast.ann, endpoint, cast.hers, json=body)]
    if status == 404:
        stranger = who if who is cast.admin else cast.bob
        absent = {name: "small" if name == "name" else NOBODY for name in cast.hers}
        return [await cast.ask(stranger, endpoint, ids, json=body) for ids in (cast.hers, absent)]
    if status == 412:
        ids = cast.hers if who is cast.ann else {"user_id": cast.ann.id}
        return [await cast.ask(who, endpoint, ids, json=body, if_match=tag) for tag in ('"v999"', '"other"')]
    if body is not None:
        return [await cast.ask(who, endpoint, cast.hers, json={**body, "unknown": 1})]
    if endpoint == "POST /api/v1/media":
        return [await upload_of_nothing(cast.ann)]
    return [await cast.ask(who, endpoint, cast.hers, "?unknown=1")]


async def upload_of_nothing(ann: Person) -> Answer:
    return await ann.upload(b"")


def shown(endpoint: str) -> bool:
    """Of what a GET answers, unless there is none of it here, or it has no end."""
    there = not ENDPOINTS[endpoint].public or "{user_id}" in endpoint
    return endpoint.startswith(("GET", "HEAD")) and there and not endpoint.endswith("/stream")


@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if shown(name)])
async def test_shows_to_its_owner(cast: Cast, endpoint: str) -> None:
    """The other half: what is refused to others is there."""
    who = cast.admin if 403 in ENDPOINTS[endpoint].refuses else cast.ann
    assert (await cast.ask(who, endpoint, {**cast.hers, "user_id": cast.ann.id})).status == 200
