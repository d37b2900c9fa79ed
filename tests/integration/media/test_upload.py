"""Uploading, from the request to the object store and the database."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from services.media import repository
from services.media.settings import Settings
from shared.ids import new_id
from shared.testing import eventually
from tests.integration.media import images
from tests.integration.media.conftest import Keys, World, running


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "avif"])
async def test_an_image_becomes_three_variants(world: World, kind: str) -> None:
    data = images.photo(800, 600, kind)
    status, media, headers = await world.upload(data, f"image/{kind}")
    assert status == 202
    assert headers["Location"] == f"/api/v1/media/{media['id']}"
    assert media["status"] == "processing"
    assert media["variants"] == []
    assert media["sha256"] == hashlib.sha256(data).hexdigest()
    assert (media["content_type"], media["bytes"]) == (f"image/{kind}", len(data))
    media = await world.settled(media["id"])
    assert (media["status"], media["failure"], media["width"], media["height"]) == ("ready", None, 800, 600)
    assert media["placeholder"].startswith("data:image/webp;base64,")
    assert [(v["name"], v["width"], v["height"]) for v in media["variants"]] == [
        ("small", 256, 192),
        ("medium", 640, 480),
        ("large", 800, 600),
    ]
    for variant in media["variants"]:
        async with world.http.get(world.url + variant["url"]) as answer:  # as an <img> does: without a token
            body = await answer.read()
            assert (answer.status, answer.content_type, len(body)) == (200, "image/webp", variant["bytes"])
        assert body[8:12] == b"WEBP"
        assert images.size(body) == (variant["width"], variant["height"])


async def test_is_turned_upright_and_stripped(world: World) -> None:
    assert images.metadata(images.turned())
    media = await world.settled((await world.uploaded(images.turned()))["id"])
    assert (media["width"], media["height"]) == (200, 300)
    _, body, _ = await world.call("GET", f"/api/v1/media/{media['id']}/variants/large")
    assert images.size(body) == (200, 300)
    assert not images.metadata(body)


async def test_as_a_form(world: World) -> None:
    form = aiohttp.FormData()
    form.add_field("note", "passed over")
    form.add_field("file", images.photo(300, 200), filename="../x.svg", content_type="image/svg+xml")
    status, media, _ = await world.call("POST", "/api/v1/media", data=form)
    assert (status, media["content_type"], media["bytes"]) == (202, "image/jpeg", len(images.photo(300, 200)))


async def test_a_form_without_file(world: World) -> None:
    status, problem, _ = await world.call("POST", "/api/v1/media", data=aiohttp.FormData({"other": "x"}))
    assert status in (415, 422)
    form = aiohttp.MultipartWriter("form-data")
    form.append("x").set_content_disposition("form-data", name="other")
    status, problem, _ = await world.call("POST", "/api/v1/media", data=form)
    assert (status, problem["errors"][0]["pointer"]) == (422, "/file")
    bad_name = b'--x\r\nContent-Disposition: form-data; name="\x0b"\r\n\r\nx\r\n--x--\r\n'
    cut_off = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + images.photo(300, 200)
    bad_charset = b'--x\r\nContent-Disposition: form-data; name="_charset_"\r\n\r\n' + b"q" * 100 + b"\r\n--x--\r\n"
    for body in (b"nonsense", bad_name, cut_off, bad_charset):
        status, problem, _ = await world.upload(body, "multipart/form-data; boundary=x")
        assert status in (400, 422), body[:80]


@pytest.mark.parametrize(
    ("data", "declared", "status"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 415),
        (b"hello", "image/jpeg", 415),
        (b"%PDF-1.7", "application/octet-stream", 415),
        (b"\xff\xd8\xff\xe0", "text/html", 415),
        (b"", "image/jpeg", 422),
    ],
)
async def test_what_is_no_image_is_refused_and_not_stored(
    world: World, data: bytes, declared: str, status: int
) -> None:
    got, problem, headers = await world.upload(data, declared)
    assert got == status
    assert headers["Content-Type"] == "application/problem+json"
    assert problem["type"].startswith("urn:tenfold:error:")
    assert await world.is_empty()
    assert (await world.call("GET", "/api/v1/media"))[1] == {"items": [], "next_cursor": None}


async def test_a_request_without_a_body_is_refused(world: World) -> None:
    """One that does not even say that it has none."""
    for content_type in ("image/jpeg", "multipart/form-data; boundary=x"):
        reader, writer = await asyncio.open_connection(*world.url.removeprefix("http://").split(":"))
        writer.write(
            f"POST /api/v1/media HTTP/1.1\r\nHost: x\r\nAuthorization: {world.bearer['Authorization']}\r\n"
            f"Content-Type: {content_type}\r\n\r\n".encode()
        )
        assert (await reader.readline()).split()[1] in (b"400", b"422")
        writer.close()


async def test_without_a_token(world: World) -> None:
    async with world.http.post(f"{world.url}/api/v1/media", data=images.photo(300, 200)) as answer:
        assert answer.status == 401


async def test_too_large(media_settings: Settings, keys: Keys) -> None:
    limit = len(images.photo(300, 200))

    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield images.photo(300, 200)

    async with running(msgspec.structs.replace(media_settings, upload_max_bytes=limit), keys) as world:
        await world.uploaded(images.photo(300, 200))
        before = world.stored()
        assert (await world.upload(images.photo(300, 200) + b"x"))[0] == 413
        status, problem, _ = await world.upload(chunked())
        assert (status, problem["type"]) == (413, "urn:tenfold:error:too-large")

        async def clean() -> bool:
            return [name for name in world.stored() if name.startswith("originals")] == before[:1]

        await eventually(clean)


async def test_going_away_half_way_leaves_nothing(world: World) -> None:
    reader, writer = await asyncio.open_connection(*world.url.removeprefix("http://").split(":"))
    token = world.bearer["Authorization"]
    data = images.photo(1600, 1200)
    writer.write(
        f"POST /api/v1/media HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n"
        f"Content-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    )
    writer.write(data[: len(data) // 2])
    await writer.drain()

    async def arrives() -> bool:
        return bool(world.stored())

    await eventually(arrives)
    writer.transport.abort()
    await eventually(world.is_empty)
    assert (await world.call("GET", "/api/v1/media/usage"))[1]["items"] == 0
    assert reader is not None


async def test_a_stalled_upload_is_given_up(media_settings: Settings, keys: Keys) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield images.photo(300, 200)[:1000]
        await asyncio.Event().wait()

    async with running(msgspec.structs.replace(media_settings, upload_stall_seconds=0.1), keys) as world:
        status, problem, _ = await world.upload(stalling())
        assert (status, problem["type"]) == (408, "urn:tenfold:error:upload-timeout")
        await eventually(world.is_empty)


async def test_uploads_that_died_with_the_process_are_swept(world: World) -> None:
    """What a kill -9 leaves behind: the row that announced the upload, and bytes of any state."""
    blob_id = new_id()
    async with world.db.transaction() as tx:
        await tx.execute("INSERT INTO blobs (id, doomed_at) VALUES ($1, now() - interval '1 second')", blob_id)
    folder = world.store / "originals"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(blob_id)).write_bytes(b"x")
    (folder / f"{blob_id}#1").write_bytes(b"x")
    await eventually(world.is_empty)


async def test_what_is_to_be_swept_is_found_by_an_index(world: World) -> None:
    async with world.db.transaction() as tx:
        await tx.execute(
            "INSERT INTO blobs (id, doomed_at) SELECT gen_random_uuid(), now() + interval '1 hour'"
            " FROM generate_series(1, 5000)"
        )
        await tx.execute("ANALYZE blobs")
        plan = [row[0] for row in await tx.fetch(f"EXPLAIN {repository._DOOMED_BLOBS}", 100)]
    assert any("Index Cond" in line and "doomed_at <=" in line for line in plan)


async def test_sending_again_with_the_same_key(world: World) -> None:
    key = {"Idempotency-Key": str(new_id())}
    first = await world.upload(images.photo(300, 200), **key)
    again = await world.upload(images.photo(300, 200), **key)
    assert (first[0], again[0]) == (202, 202)
    assert first[1]["id"] == again[1]["id"]
    other = await world.upload(images.photo(300, 200, seed=2), **key)
    assert (other[0], other[1]["type"]) == (422, "urn:tenfold:error:idempotency-key-reused")
    assert len((await world.call("GET", "/api/v1/media"))[1]["items"]) == 1

    async def one_original() -> bool:
        return len([name for name in world.stored() if name.startswith("originals")]) == 1

    await eventually(one_original)
    assert await world.blobs() == 1


async def test_identical_bytes_are_stored_once_and_deleted_with_the_last(world: World) -> None:
    answers = await asyncio.gather(*(world.uploaded(images.photo(300, 200)) for _ in range(5)))
    ids = [answer["id"] for answer in answers]
    for media_id in ids:
        assert (await world.settled(media_id))["status"] == "ready"

    async def stored_once() -> bool:
        return len(world.stored()) == 4 and await world.blobs() == 1

    await eventually(stored_once)
    for media_id in ids[:-1]:
        assert (await world.call("DELETE", f"/api/v1/media/{media_id}"))[0] == 204
        assert (await world.call("GET", f"/api/v1/media/{media_id}"))[0] == 404
    assert (await world.call("GET", f"/api/v1/media/{ids[-1]}/original"))[1] == images.photo(300, 200)
    assert await stored_once()
    assert (await world.call("DELETE", f"/api/v1/media/{ids[-1]}"))[0] == 204
    await eventually(world.is_empty)
    assert (await world.call("GET", "/api/v1/media/usage"))[1]["bytes"] == 0


async def test_quota(media_settings: Settings, keys: Keys) -> None:
    size = len(images.photo(300, 200))
    settings = msgspec.structs.replace(media_settings, quota_items=2, quota_bytes=3 * size)
    async with running(settings, keys) as world:
        answers = await asyncio.gather(*(world.upload(images.photo(300, 200)) for _ in range(6)))
        assert sorted(status for status, _, _ in answers) == [202, 202, 409, 409, 409, 409]
        assert {body["type"] for status, body, _ in answers if status == 409} == {"urn:tenfold:error:quota-exceeded"}
        usage = (await world.call("GET", "/api/v1/media/usage"))[1]
        assert usage == {"bytes": 2 * size, "items": 2, "quota_bytes": 3 * size, "quota_items": 2}
        media_id = next(body["id"] for status, body, _ in answers if status == 202)
        await world.call("DELETE", f"/api/v1/media/{media_id}")
        assert (await world.upload(images.photo(300, 200)))[0] == 202
