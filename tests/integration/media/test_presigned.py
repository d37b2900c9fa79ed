"""Uploads straight to the store: a local one by a signed URL of the API, S3 by presigned URLs."""

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urljoin

import aiohttp
import msgspec
import pytest

from services.media.settings import Settings
from shared.ids import new_id
from shared.objects import Objects
from shared.testing import eventually
from tests.integration.media import images, s3
from tests.integration.media.conftest import Keys, World, running

PHOTO = images.photo(300, 200)


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    if s3.PYTHON is None:
        pytest.skip(s3.MISSING)
    with s3.serving(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def store_settings(
    request: pytest.FixtureRequest, media_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    if request.param == "local":
        return media_settings
    for name, value in request.getfixturevalue("s3_server").environ.items():
        monkeypatch.setenv(name, value)
    return msgspec.structs.replace(media_settings, object_store_url=f"s3://{s3.BUCKET}/{new_id()}")


@pytest.fixture
async def anywhere(store_settings: Settings, keys: Keys) -> AsyncIterator[World]:
    async with running(store_settings, keys) as opened:
        yield opened


async def _announce(world: World, **headers: str) -> Any:
    body = {"content_type": "image/jpeg", "bytes": len(PHOTO)}
    status, upload, _ = await world.call("POST", "/api/v1/media/uploads", headers, json=body)
    assert status == 201, upload
    return upload


async def _send(world: World, upload: Any, data: bytes = PHOTO) -> int:
    """As a client without a token does."""
    url = urljoin(world.url, upload["upload_url"])
    async with world.http.request(upload["method"], url, data=data, headers=upload["headers"]) as answer:
        return answer.status


async def _complete(world: World, upload: Any) -> tuple[int, Any]:
    status, body, _ = await world.call("POST", f"/api/v1/media/uploads/{upload['id']}/complete")
    return status, body


async def test_sent_and_completed(anywhere: World) -> None:
    upload = await _announce(anywhere)
    assert datetime.fromisoformat(upload["expires_at"]) > datetime.now(UTC)
    assert await _complete(anywhere, upload) == (409, _any_problem("upload-incomplete"))
    assert await _send(anywhere, upload) in (200, 204)
    answers = await asyncio.gather(*(_complete(anywhere, upload) for _ in range(3)))
    assert {status for status, _ in answers} == {202}
    assert len({media["id"] for _, media in answers}) == 1
    media = await anywhere.settled(answers[0][1]["id"])
    assert (media["status"], media["bytes"], media["sha256"]) == (
        "ready",
        len(PHOTO),
        hashlib.sha256(PHOTO).hexdigest(),
    )
    _, body, _ = await anywhere.call("GET", f"/api/v1/media/{media['id']}/original")
    assert body == PHOTO
    async with anywhere.http.get(anywhere.url + media["variants"][0]["url"]) as answer:
        assert images.size(await answer.read()) == (256, 171)
    assert (await anywhere.call("GET", "/api/v1/media/usage"))[1]["items"] == 1
    assert len((await anywhere.call("GET", "/api/v1/media"))[1]["items"]) == 1
    await anywhere.call("DELETE", f"/api/v1/media/{media['id']}")
    assert (await _complete(anywhere, upload))[0] == 404


class _any_problem:  # noqa: N801 - reads as a value
    def __init__(self, type_: str) -> None:
        self._type = f"urn:tenfold:error:{type_}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and other["type"] == self._type

    def __hash__(self) -> int:
        return hash(self._type)


async def test_what_is_written_after_completion_changes_nothing(anywhere: World) -> None:
    """The URL holds still: what was hashed, and may be shared with others by its hash, must be out of its reach."""
    upload = await _announce(anywhere)
    await _send(anywhere, upload)
    _, media = await _complete(anywhere, upload)
    await _send(anywhere, upload, b"\xff\xd8\xff" + bytes(len(PHOTO) - 3))  # S3 takes it
    _, body, _ = await anywhere.call("GET", f"/api/v1/media/{media['id']}/original")
    assert body == PHOTO
    assert (await _complete(anywhere, upload))[1]["sha256"] == hashlib.sha256(PHOTO).hexdigest()


@pytest.mark.parametrize(
    ("data", "status", "type_"),
    [
        (PHOTO[:-1], 409, "upload-incomplete"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>".ljust(len(PHOTO)), 415, "not-an-image"),
    ],
    ids=["shorter", "svg"],
)
async def test_what_is_not_as_announced_is_refused(anywhere: World, data: bytes, status: int, type_: str) -> None:
    upload = await _announce(anywhere)
    if await _send(anywhere, upload, data) < 300:
        assert await _complete(anywhere, upload) == (status, _any_problem(type_))
    assert (await anywhere.call("GET", "/api/v1/media/usage"))[1]["items"] == 0
    assert await _send(anywhere, upload) < 300  # it can be mended
    assert (await _complete(anywhere, upload))[0] == 202


async def test_more_than_announced_is_not_taken(anywhere: World) -> None:
    upload = await _announce(anywhere)
    if (status := await _send(anywhere, upload, PHOTO + b"x")) >= 300:
        assert status == 413  # S3 cannot know
    assert await _complete(anywhere, upload) == (409, _any_problem("upload-incomplete"))


async def test_identical_bytes_are_stored_once(anywhere: World) -> None:
    first = await anywhere.uploaded(PHOTO)
    upload = await _announce(anywhere)
    await _send(anywhere, upload)
    _, second = await _complete(anywhere, upload)
    assert first["id"] != second["id"]

    async def one_blob() -> bool:
        return await anywhere.blobs() == 1

    await eventually(one_blob)
    for media in (first, second):
        assert (await anywhere.settled(media["id"]))["status"] == "ready"


async def test_is_its_owners_only(anywhere: World) -> None:
    upload = await _announce(anywhere)
    await _send(anywhere, upload)
    anywhere.user_id, owner = new_id(), anywhere.user_id
    assert (await _complete(anywhere, upload))[0] == 404
    anywhere.user_id = owner
    assert (await _complete(anywhere, upload))[0] == 202


async def test_what_is_complete_counts_until_it_is_swept(media_settings: Settings, keys: Keys) -> None:
    """The bytes as they were sent stay until nobody can be sending any more."""
    settings = msgspec.structs.replace(media_settings, quota_bytes=2 * len(PHOTO))
    async with running(settings, keys) as world:
        upload = await _announce(world)
        await _send(world, upload)
        status, media = await _complete(world, upload)
        assert status == 202
        assert (await world.call("DELETE", f"/api/v1/media/{media['id']}"))[0] == 204
        second = await _announce(world)
        body = {"content_type": "image/jpeg", "bytes": len(PHOTO)}
        status, problem, _ = await world.call("POST", "/api/v1/media/uploads", json=body)
        assert (status, problem) == (409, _any_problem("quota-exceeded"))
        assert [name for name in world.stored() if name.startswith("incoming/")] == [f"incoming/{upload['id']}"]
        await _send(world, second)
        assert (await _complete(world, second))[0] == 202


async def test_announced_at_once_no_more_than_the_quota_are_taken(media_settings: Settings, keys: Keys) -> None:
    async with running(msgspec.structs.replace(media_settings, quota_items=3), keys, worker=False) as world:
        body = {"content_type": "image/jpeg", "bytes": len(PHOTO)}
        answers = await asyncio.gather(
            *(world.call("POST", "/api/v1/media/uploads", json=body) for _ in range(20)),
        )
        assert sorted(status for status, _, _ in answers) == [201] * 3 + [409] * 17


async def test_open_uploads_count_towards_the_quota(media_settings: Settings, keys: Keys) -> None:
    settings = msgspec.structs.replace(media_settings, quota_items=2, upload_max_bytes=len(PHOTO))
    body = {"content_type": "image/jpeg", "bytes": len(PHOTO)}
    async with running(settings, keys) as world:
        key = {"Idempotency-Key": "k"}
        first, again = await _announce(world, **key), await _announce(world, **key)
        assert first["id"] == again["id"]
        await _announce(world)
        status, problem, _ = await world.call("POST", "/api/v1/media/uploads", json=body)
        assert (status, problem) == (409, _any_problem("quota-exceeded"))
        status, _, _ = await world.call("POST", "/api/v1/media/uploads", json=body | {"bytes": len(PHOTO) + 1})
        assert status == 413
        status, _, _ = await world.call("POST", "/api/v1/media/uploads", json=body | {"content_type": "image/svg+xml"})
        assert status == 422


async def test_only_by_the_signed_url(world: World) -> None:
    upload = await _announce(world)
    for url in (upload["upload_url"].partition("?")[0], upload["upload_url"][:-1] + "x"):
        assert await _send(world, upload | {"upload_url": url}) in (404, 422)
    other = await _announce(world)
    query = upload["upload_url"].partition("?")[2]
    assert await _send(world, upload | {"upload_url": f"/api/v1/media/uploads/{other['id']}?{query}"}) == 404
    assert world.stored() == []
    assert await _send(world, upload) == 204
    assert (await _complete(world, upload))[0] == 202
    assert await _send(world, upload) == 409


async def test_what_was_abandoned_is_swept(store_settings: Settings, keys: Keys) -> None:
    async with running(store_settings, keys) as world:
        objects = Objects.at(store_settings.object_store_url)
        done, abandoned, empty = [await _announce(world) for _ in range(3)]
        for upload in (done, abandoned):
            await _send(world, upload)
        _, media = await _complete(world, done)
        await world.settled(media["id"])
        async with world.db.transaction() as tx:
            await tx.execute("UPDATE uploads SET expires_at = now() - interval '2 s', doomed_at = now()")

        async def swept() -> bool:
            left = [await objects.head(f"incoming/{upload['id']}") for upload in (done, abandoned, empty)]
            async with world.db.transaction() as tx:
                return left == [None] * 3 and await tx.fetchval("SELECT count(*) FROM uploads") == 0

        await eventually(swept)
        assert (await _complete(world, abandoned))[0] == 404
        _, body, _ = await world.call("GET", f"/api/v1/media/{media['id']}/original")
        assert body == PHOTO


async def test_variants_are_fetched_from_the_store(
    media_settings: Settings, keys: Keys, s3_server: s3.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environ.items():
        monkeypatch.setenv(name, value)
    public = s3_server.endpoint.replace("127.0.0.1", "localhost")
    settings = msgspec.structs.replace(
        media_settings,
        object_store_url=f"s3://{s3.BUCKET}/{new_id()}",
        object_store_public_endpoint=public,
        redirect_to_store=True,
    )
    async with running(settings, keys) as world:
        upload = await _announce(world)
        assert upload["upload_url"].startswith(public)
        await _send(world, upload)
        media = await world.settled((await _complete(world, upload))[1]["id"])
        async with world.http.get(world.url + media["variants"][0]["url"], allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Cache-Control"]) == (307, "public, max-age=300, must-revalidate")
            where = answer.headers["Location"]
        assert where.startswith(public)
        async with world.http.get(where) as answer:
            assert (answer.status, answer.content_type) == (200, "image/webp")
            assert images.size(await answer.read()) == (256, 171)
        _, body, _ = await world.call("GET", f"/api/v1/media/{media['id']}/original")  # of a type that others chose
        assert body == PHOTO


async def test_direct_uploads_on_s3(
    media_settings: Settings, keys: Keys, s3_server: s3.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the API: in parts, cut off, too large."""
    for name, value in s3_server.environ.items():
        monkeypatch.setenv(name, value)
    settings = msgspec.structs.replace(
        media_settings, object_store_url=f"s3://{s3.BUCKET}/{new_id()}", upload_max_bytes=12 * 2**20
    )
    async with running(settings, keys, worker=False) as world:
        large = b"\xff\xd8\xff" + os.urandom(11 * 2**20)
        media = await world.uploaded(large)
        assert (await world.call("GET", f"/api/v1/media/{media['id']}/original"))[1] == large
        asked = {"Range": "bytes=-5"}
        assert (await world.call("GET", f"/api/v1/media/{media['id']}/original", asked))[:2] == (206, large[-5:])
        assert (await world.upload(large + bytes(2 * 2**20)))[0] == 413

        async def chunks() -> AsyncIterator[bytes]:
            yield large
            yield bytes(2 * 2**20)

        assert (await world.upload(chunks()))[0] == 413
        form = aiohttp.FormData()
        form.add_field("file", io.BytesIO(large))
        assert (await world.call("POST", "/api/v1/media", data=form))[0] == 202

        async def one_blob() -> bool:
            return await world.blobs() == 1

        await eventually(one_blob)
