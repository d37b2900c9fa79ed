"""An account from its first email to the moment when nothing is left of it."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio

from shared.testing import eventually
from tests.e2e.conftest import PASSWORD, Person, Platform, photo

pytestmark = pytest.mark.timeout(180)

NEW = "another horse battery"


async def link(platform: Platform, person: Person, purpose: str) -> str:
    """The token in the newest email that has a link for that."""

    async def found() -> str | None:
        tokens = [
            t for mail in await platform.mails(person.email) for t in re.findall(rf"#{purpose}=(\S+)", mail["text"])
        ]
        return tokens[-1] if tokens else None

    token = await eventually(found, within=30)
    assert token
    return token


async def test_the_address_is_proven_and_the_password_reset_by_email(platform: Platform, ann: Person) -> None:
    token = await link(platform, ann, "verify")
    assert (await ann.call("PUT", f"/api/v1/email-verifications/{token}")).status == 204
    assert (await ann.get("/api/v1/users/me")).body["email_verified"]
    assert (await ann.post("/api/v1/password-resets", {"email": ann.email})).status == 202
    path = f"/api/v1/password-resets/{await link(platform, ann, 'reset')}"
    assert (await ann.call("PUT", path, {"new_password": NEW})).status == 204
    for password, status in ((PASSWORD, 401), (NEW, 201)):
        answer = await ann.post("/api/v1/sessions", {"email": ann.email, "password": password})
        assert answer.status == status

    async def told() -> bool:
        return any("password of your account was changed" in mail["text"] for mail in await platform.mails(ann.email))

    await eventually(told, within=30)


async def own_objects(platform: Platform, person: Person) -> set[Path]:
    """What is in the store for this person only."""
    connection = await asyncpg.connect(platform.stack.urls.postgres_primary)
    try:
        rows = await connection.fetch(
            "SELECT blob_id FROM media.media WHERE owner_id::text = $1"
            " EXCEPT SELECT blob_id FROM media.media WHERE owner_id::text <> $1",
            person.id,
        )
    finally:
        await connection.close()
    # Not `rglob`, which raises when a folder goes while it looks.
    objects = os.walk(platform.stack.root / "data" / "objects")
    files = (Path(folder, name) for folder, _, names in objects for name in names)
    return {path for path in files if any(str(row["blob_id"]) in str(path) for row in rows)}


async def traces(platform: Platform, person: Person, ids: list[str]) -> list[str]:
    """Where something of the person can be found: rows of any table of any service, keys and values in Redis."""
    words = [person.id, person.email, person.name, *ids]
    found = []
    connection = await asyncpg.connect(platform.stack.urls.postgres_primary)
    try:
        tables = await connection.fetch(
            "SELECT table_schema, table_name FROM information_schema.tables WHERE table_type = 'BASE TABLE'"
            " AND table_schema IN ('users', 'media', 'notifier')"
        )
        for schema, table in tables:
            # bytea columns are shown as hex, so what they hold is looked for in hex as well.
            for row in await connection.fetch(f'SELECT row_to_json(t)::text FROM "{schema}"."{table}" t'):
                if any(word in row[0] or word.encode().hex() in row[0] for word in words):
                    found.append(f"{schema}.{table}")
    finally:
        await connection.close()
    if platform.stack.urls.redis:
        client: Any = redis.asyncio.Redis.from_url(platform.stack.urls.redis)
        async for key in client.scan_iter():
            kind = (await client.type(key)).decode()
            values = await client.hgetall(key) if kind == "hash" else await client.get(key) if kind == "string" else b""
            if any(word in str(values) for word in words):
                found.append(f"redis value {key}")
            # A bare id may be in the name of a key that is about to expire.
            if any(word in key.decode() for word in words) and not 0 <= await client.ttl(key) <= 60:
                found.append(f"redis key {key}")
        await client.aclose()
    return found


async def test_nothing_is_left_of_a_deleted_account(platform: Platform, ann: Person) -> None:
    await ann.call("PATCH", "/api/v1/users/me", {"display_name": ann.name, "bio": ann.name})
    await ann.post("/api/v1/sessions", {"email": ann.email, "password": "wrong password"})
    await ann.post("/api/v1/password-resets", {"email": ann.email})
    await ann.post("/api/v1/password-resets", {"email": f"x{ann.email}"})
    again = {"email": f"again-{ann.email}", "password": PASSWORD, "display_name": ann.name}
    twin = Person(ann.base, ann.http)
    twin.email, twin.name = again["email"], ann.name
    made = await twin.post("/api/v1/users", again, idempotency_key=f"key-{twin.email[:40]}")
    twin.id = made.body["id"]
    session = await twin.post("/api/v1/sessions", {"email": twin.email, "password": PASSWORD})
    twin.token = session.body["access_token"]
    for person in (ann, twin):
        await person.get(f"/api/v1/users/{person.id}")  # into the cache
    data = photo(900, 600, seed=int(time.time()))
    kept = await platform.person()
    shared = (await kept.upload(data)).body["id"]
    first = (await ann.upload(data, **{"Idempotency-Key": "once"})).body["id"]
    own = await ann.upload(photo(700, 500, seed=int(time.time()) + 1))
    await ann.until(first, "ready")
    await kept.until(shared, "ready")
    # In the midst of things: a photo is being processed, another has just come.
    last = await ann.upload(photo(1600, 1200, seed=int(time.time()) + 2))
    ids = [first, own.body["id"], last.body["id"]]
    objects = await own_objects(platform, ann)
    assert await traces(platform, ann, ids)  # it would be seen
    assert objects
    started = time.monotonic()
    assert (await ann.call("DELETE", "/api/v1/users/me", if_match='"v1"')).status == 412
    for person in (ann, twin):
        assert (await person.call("DELETE", "/api/v1/users/me")).status == 202
        assert (await person.get("/api/v1/users/me")).status == 401
        assert (await person.get(f"/api/v1/users/{person.id}")).status == 404
    late = await ann.upload(photo(400, 300, seed=int(time.time()) + 3))  # her token is good for some minutes more
    ids += [late.body["id"]] if late.status == 202 else []

    async def gone() -> bool:
        left = [*await traces(platform, ann, ids), *await traces(platform, twin, [])]
        left += [str(path) for path in objects if path.exists()]
        assert left == []
        return True

    await eventually(gone, within=60, every=0.5)
    print(f"nothing left of two accounts after {time.monotonic() - started:.1f} s")
    refused = await ann.upload(photo(400, 300, seed=int(time.time()) + 4))
    assert (refused.status, json.dumps(refused.body).count(ann.id)) == (401, 0)
    assert await kept.until(shared, "ready")  # the same bytes, somebody else's
    async with kept.http.get(kept.base + (await kept.media(shared))["variants"][0]["url"]) as response:
        assert response.status == 200
    assert (await ann.post("/api/v1/sessions", {"email": ann.email, "password": PASSWORD})).status in (401, 429)
    answer: Any = await ann.post("/api/v1/users", {"email": ann.email, "password": PASSWORD, "display_name": "A"})
    assert answer.status == 201  # the address is free again
