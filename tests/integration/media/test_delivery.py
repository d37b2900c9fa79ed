"""Looking at, changing and fetching media."""

import email
import hashlib
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from shared import consistency
from shared.ids import new_id
from tests.integration.media import images
from tests.integration.media.conftest import World

PHOTO = (300, 200)


async def _original(world: World, **headers: str) -> tuple[int, Any, Any]:
    media = await world.uploaded(images.photo(*PHOTO))
    return await world.call("GET", f"/api/v1/media/{media['id']}/original", headers)


async def test_the_original_comes_back_as_it_was(world: World) -> None:
    status, body, headers = await _original(world)
    assert (status, body) == (200, images.photo(*PHOTO))
    assert headers["Content-Type"] == "image/jpeg"
    assert headers["ETag"] == f'"{hashlib.sha256(body).hexdigest()}"'
    assert headers["Cache-Control"] == "private, no-cache"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Disposition"].startswith('inline; filename="')
    assert headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "start", "end"), [("bytes=0-9", 0, 10), ("bytes=10-", 10, None), ("bytes=-7", -7, None)]
)
async def test_a_range(world: World, asked: str, start: int, end: int | None) -> None:
    data = images.photo(*PHOTO)
    status, body, headers = await _original(world, Range=asked)
    assert (status, body) == (206, data[start:end])
    first = start % len(data)
    assert headers["Content-Range"] == f"bytes {first}-{first + len(body) - 1}/{len(data)}"


async def test_several_ranges(world: World) -> None:
    data = images.photo(*PHOTO)
    status, body, headers = await _original(world, Range="bytes=0-9,20-29,-5")
    assert (status, int(headers["Content-Length"])) == (206, len(body))
    message = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n" + body)
    assert message.get_content_type() == "multipart/byteranges"
    size = len(data)
    assert [part["Content-Range"] for part in message.walk()][1:] == [
        f"bytes 0-9/{size}", f"bytes 20-29/{size}", f"bytes {size - 5}-{size - 1}/{size}"
    ]  # fmt: skip
    for span in (data[:10], data[20:30], data[-5:]):
        assert span in body


async def test_a_range_that_is_not_there(world: World) -> None:
    status, problem, headers = await _original(world, Range="bytes=999999-")
    assert (status, problem["status"]) == (416, 416)
    assert headers["Content-Range"] == f"bytes */{len(images.photo(*PHOTO))}"


async def test_if_range(world: World) -> None:
    tag = f'"{hashlib.sha256(images.photo(*PHOTO)).hexdigest()}"'
    assert (await _original(world, **{"Range": "bytes=0-9", "If-Range": tag}))[0] == 206
    assert (await _original(world, **{"Range": "bytes=0-9", "If-Range": '"other"'}))[0] == 200


async def test_what_the_caller_has_is_not_sent_again(world: World) -> None:
    tag = f'"{hashlib.sha256(images.photo(*PHOTO)).hexdigest()}"'
    assert (await _original(world, **{"If-None-Match": tag}))[:2] == (304, b"")
    assert (await _original(world, **{"If-None-Match": '"other"'}))[0] == 200


async def test_head(world: World) -> None:
    media = await world.uploaded(images.photo(*PHOTO))
    status, body, headers = await world.call("HEAD", f"/api/v1/media/{media['id']}/original")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(images.photo(*PHOTO))))


async def test_nobody_else_sees_private_media(world: World) -> None:
    media = await world.settled((await world.uploaded(images.photo(*PHOTO)))["id"])
    path = f"/api/v1/media/{media['id']}"
    stranger = world.keys.bearer(new_id())
    for method, where in (
        ("GET", path), ("DELETE", path), ("GET", f"{path}/original"), ("GET", f"{path}/variants/small")
    ):  # fmt: skip
        assert (await world.call(method, where, stranger))[0] == 404
    assert (await world.call("PATCH", path, stranger, json={"title": "mine"}))[0] == 404
    assert (await world.call("GET", "/api/v1/media", stranger))[1]["items"] == []
    for where in ("original", "variants/small"):
        async with world.http.get(f"{world.url}{path}/{where}") as answer:
            assert answer.status == 404


async def test_everybody_sees_public_media(world: World) -> None:
    media = await world.settled((await world.uploaded(images.photo(*PHOTO)))["id"])
    path = f"/api/v1/media/{media['id']}"
    status, changed, _ = await world.call("PATCH", path, json={"visibility": "public"})
    assert (status, changed["visibility"], changed["version"]) == (200, "public", media["version"] + 1)
    async with world.http.get(f"{world.url}{path}/variants/small") as answer:
        assert answer.status == 200
        assert answer.headers["Cache-Control"] == "public, max-age=600, must-revalidate"
    async with world.http.get(f"{world.url}{path}") as answer:
        assert answer.status == 401


async def test_public_media_can_be_taken_back(world: World) -> None:
    """Caches ask again after minutes; with what they have, nobody is told that it holds still."""
    media = await world.settled((await world.uploaded(images.photo(*PHOTO)))["id"])
    path = f"/api/v1/media/{media['id']}"
    await world.call("PATCH", path, json={"visibility": "public"})
    stranger = world.keys.bearer(new_id())
    for where in (f"{path}/original", f"{path}/variants/small"):
        status, _, headers = await world.call("GET", where, stranger)
        assert (status, headers["Cache-Control"]) == (200, "public, max-age=600, must-revalidate")
        cached = {**stranger, "If-None-Match": headers["ETag"]}
        assert (await world.call("GET", where, cached))[0] == 304
        await world.call("PATCH", path, json={"visibility": "private"})
        assert (await world.call("GET", where, cached))[0] == 404
        await world.call("PATCH", path, json={"visibility": "public"})


async def test_strangers_see_the_original_and_do_not_learn_where_it_was_taken(world: World) -> None:
    data = images.turned()
    media = await world.settled((await world.uploaded(data))["id"])
    path = f"/api/v1/media/{media['id']}/original"
    stranger = world.keys.bearer(new_id())
    assert (await world.call("GET", path, stranger))[0] == 404
    async with world.http.get(world.url + media["original_url"]) as answer:  # signed: without a token
        signed = await answer.read()
        assert (answer.status, answer.headers["Vary"]) == (200, "Authorization")
        assert answer.headers["Cache-Control"].startswith("public, max-age=")
    await world.call("PATCH", path.removesuffix("/original"), json={"visibility": "public"})
    status, public, headers = await world.call("GET", path, stranger)
    assert (status, public, headers["Content-Type"]) == (200, signed, "image/jpeg")
    assert headers["ETag"] == f'"{hashlib.sha256(public).hexdigest()}"'
    assert headers["Cache-Control"] == "public, max-age=600, must-revalidate"
    assert (b"Secretive" in data, b"Secretive" in public) == (True, False)
    assert images.size(public) == images.size(data)
    assert (await world.call("GET", path))[1] == data  # the owner's are the very bytes
    whole = {"Range": f"bytes=0-{len(public) - 1}"}
    for asked, expected in (("bytes=0-40", public[:41]), ("bytes=1-", public[1:]), ("bytes=-9", public[-9:])):
        assert (await world.call("GET", path, {**stranger, "Range": asked}))[:2] == (206, expected)
    assert (await world.call("GET", path, {**stranger, **whole}))[1] == public
    several = await world.call("GET", path, {**stranger, "Range": "bytes=0-9,20-60"})
    assert (several[0], public[:10] in several[1], public[20:61] in several[1]) == (206, True, True)
    status, body, headers = await world.call("HEAD", path, stranger)
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(public)))
    query = urlsplit(media["variants"][0]["url"]).query  # a signature for something else
    await world.call("PATCH", path.removesuffix("/original"), json={"visibility": "private"})
    seen = {consistency.HEADER: world.token}  # a replica may not know yet that it is private
    async with world.http.get(f"{world.url}{path}?{query}", headers=seen) as answer:
        assert answer.status == 404


async def test_what_cannot_be_shown_without_metadata_is_its_owners_only(world: World) -> None:
    media = await world.settled((await world.uploaded(images.photo(*PHOTO)[:2000]))["id"])  # damaged
    path = f"/api/v1/media/{media['id']}"
    await world.call("PATCH", path, json={"visibility": "public"})
    assert (await world.call("GET", f"{path}/original", world.keys.bearer(new_id())))[0] == 404
    assert (await world.call("GET", f"{path}/original"))[0] == 200


async def test_signed_urls(world: World) -> None:
    media = await world.settled((await world.uploaded(images.photo(*PHOTO)))["id"])
    url = media["variants"][0]["url"]
    async with world.http.get(world.url + url) as answer:
        assert answer.status == 200
        assert answer.headers["Cache-Control"].startswith("public, max-age=")
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    for path, changed, expected in (
        (parts.path.replace("small", "large"), query, 404),
        (parts.path, {**query, "expires": str(int(query["expires"]) + 1)}, 404),
        (parts.path, {**query, "signature": "0" * 64}, 404),
        (parts.path, {**query, "signature": "x"}, 422),
        (parts.path, {"expires": query["expires"]}, 404),
    ):
        async with world.http.get(world.url + path, params=changed) as answer:
            assert answer.status == expected, changed


async def test_change_and_delete_with_a_version(world: World) -> None:
    media = await world.settled((await world.uploaded(images.photo(*PHOTO)))["id"])
    path = f"/api/v1/media/{media['id']}"
    status, _, headers = await world.call("GET", path)
    stale, tag = '"v1"', headers["ETag"]
    assert (status, tag) == (200, '"v2"')
    assert (await world.call("PATCH", path, {"If-Match": stale}, json={"title": "x"}))[0] == 412
    status, changed, headers = await world.call("PATCH", path, {"If-Match": tag}, json={"title": "At the sea"})
    assert (status, changed["title"], headers["ETag"]) == (200, "At the sea", '"v3"')
    assert (await world.call("PATCH", path, json={}))[2]["ETag"] == '"v3"'
    assert (await world.call("PATCH", path, json={"owner_id": "x"}))[0] == 422
    status, body, headers = await world.call("GET", path, {"If-None-Match": '"v3"'})
    assert (status, headers["ETag"], headers["Cache-Control"]) == (200, '"v3"', "no-store")
    assert body["original_url"]  # which may be another by now, though the version is not
    assert (await world.call("DELETE", path, {"If-Match": tag}))[0] == 412
    assert (await world.call("DELETE", path, {"If-Match": '"v3"'}))[0] == 204
    for where in ("", "/original", "/variants/small"):
        assert (await world.call("GET", path + where))[0] == 404
    assert (await world.call("DELETE", path))[0] == 404


async def test_pages_newest_first(world: World) -> None:
    ids = [(await world.uploaded(images.photo(*PHOTO)))["id"] for _ in range(5)]
    seen, cursor = [], ""
    while True:
        _, page, _ = await world.call("GET", f"/api/v1/media?limit=2{cursor}")
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == ids[::-1]
    assert (await world.call("GET", "/api/v1/media?cursor=!"))[0] == 422


async def test_variants_are_absent_until_they_are_made(world: World) -> None:
    media = await world.settled((await world.uploaded(images.photo(*PHOTO)[:2000]))["id"])
    assert media["status"] == "failed"
    assert (await world.call("GET", f"/api/v1/media/{media['id']}/variants/small"))[0] == 404
    assert (await world.call("GET", f"/api/v1/media/{media['id']}/variants/huge"))[0] == 404


async def test_the_document_lists_every_route(world: World) -> None:
    _, document, _ = await world.call("GET", "/openapi.json")
    assert set(document["paths"]) == {
        "/api/v1/media",
        "/api/v1/media/uploads",
        "/api/v1/media/uploads/{upload_id}",
        "/api/v1/media/uploads/{upload_id}/complete",
        "/api/v1/media/usage",
        "/api/v1/media/{media_id}",
        "/api/v1/media/{media_id}/original",
        "/api/v1/media/{media_id}/variants/{name}",
    }
