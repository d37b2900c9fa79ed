"""What goes through the door, both ways, over real sockets."""

import asyncio
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from shared.testing import eventually
from tests.integration.gateway.conftest import Keys, World

MIB = 1024 * 1024


async def echo(request: web.Request) -> web.Response:
    """What arrived, as JSON."""
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "target": request.raw_path,
            "headers": [[name, value] for name, value in request.headers.items()],
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        },
        headers={"Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-Powered-By": "test", "X-Kept": "yes"},
    )


def headers_of(arrived: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in arrived["headers"]}


async def raw(base: str, request: bytes) -> bytes:
    """What is answered to `request`, as far as it comes, with the body that its head announces."""
    parts = urlsplit(base)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            return head + (await reader.read() if length is None else await reader.read(int(length[1])))
    finally:
        writer.close()


async def test_a_request_and_its_answer_pass(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    door = await world.in_front_of(echo)
    body = b'{"a": "%s"}' % (b"x" * 1000)
    async with http.post(
        URL(f"{door}/api/v1/webhooks?a=%2F&b=c+d", encoded=True),
        data=body,
        headers={**keys.bearer(), "Idempotency-Key": "k" * 8},
    ) as answer:
        arrived = await answer.json()
        assert answer.status == 200
        assert answer.headers["X-Kept"] == "yes"
        assert {"X-Hop", "X-Powered-By", "Server"}.isdisjoint(answer.headers)
        assert len(answer.headers.getall("Date")) == 1
    headers = headers_of(arrived)
    assert arrived["target"] == "/api/v1/webhooks?a=%2F&b=c+d"
    assert arrived["sha256"] == hashlib.sha256(body).hexdigest()
    assert headers["idempotency-key"] == "k" * 8
    assert headers["authorization"].startswith("Bearer ")
    assert headers["content-length"] == str(len(body))
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-host"] == urlsplit(door).netloc
    assert headers["host"] != headers["x-forwarded-host"]
    assert 0 < int(headers["request-timeout"]) <= 30_000
    assert headers["traceparent"].startswith("00-")


async def test_forged_headers_do_not_pass(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    door = await world.in_front_of(echo)
    forged = {
        "X-User-Id": "1",
        "X_User_Id": "1",
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Proto": "https",
        "Forwarded": "for=6.6.6.6",
        "X-Real-IP": "6.6.6.6",
        "Connection": "close, X-Secret",
        "X-Secret": "1",
        "TE": "trailers",
        "Proxy-Authorization": "x",
        "Upgrade": "h2c",
    }
    async with http.get(f"{door}/api/v1/notifications", headers={**keys.bearer(), **forged}) as answer:
        headers = headers_of(await answer.json())
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "http"
    gone = {"x-user-id", "x_user_id", "forwarded", "x-real-ip", "x-secret", "te", "proxy-authorization", "upgrade"}
    assert gone.isdisjoint(headers)
    assert "6.6.6.6" not in str(headers)


async def test_the_request_id_is_the_callers_where_it_is_sensible(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    door = await world.in_front_of(echo)
    for given, kept in (("abcdefgh-1", True), ("a b\tc", False), ("x" * 500, False)):
        async with http.get(f"{door}/api/v1/notifications", headers={**keys.bearer(), "X-Request-Id": given}) as answer:
            arrived = headers_of(await answer.json())["x-request-id"]
            assert answer.headers.getall("X-Request-Id") == [arrived]
            assert (arrived == given) is kept


async def test_routes_that_need_a_token_are_closed_at_the_door(world: World, http: aiohttp.ClientSession) -> None:
    async def never(_request: web.Request) -> web.Response:
        raise AssertionError("reached the service")

    door = await world.in_front_of(never)
    for method, path in (
        ("GET", "/api/v1/media"),
        ("POST", "/api/v1/media"),
        ("GET", "/api/v1/users/me"),
        ("GET", "/api/v1/home"),
        ("PUT", "/api/v1/notifications/read"),
        ("GET", "/api/v1/campaigns"),
        ("GET", "/api/v1/admin/users"),
    ):
        for headers in ({}, {"Authorization": "Bearer x.y.z"}, {"Authorization": "Basic x"}):
            async with http.request(method, door + path, headers=headers) as answer:
                assert answer.status == 401, (method, path)
                assert answer.content_type == "application/problem+json"
                assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_an_expired_token_is_refused(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    door = await world.in_front_of(echo)
    async with http.get(f"{door}/api/v1/users/me", headers=keys.bearer(seconds=-1)) as answer:
        assert answer.status == 401
        assert "expired" in (await answer.json(content_type=None))["detail"]


async def test_each_token_of_a_connection_is_judged_by_itself(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    door = await world.in_front_of(echo)

    async def status(headers: dict[str, str]) -> int:
        async with http.get(f"{door}/api/v1/notifications", headers=headers) as answer:
            await answer.read()  # so that the connection is kept
            return answer.status

    brief, good = keys.bearer(seconds=2), keys.bearer()
    bad = {"Authorization": good["Authorization"][:-4] + "AAAA"}
    assert [await status(h) for h in (good, good, bad, good, {})] == [200, 200, 401, 200, 401]
    assert await status(brief) == 200

    async def expired() -> bool:
        return await status(brief) == 401

    await eventually(expired)
    assert await status(good) == 200


async def test_public_and_signed_routes_are_open(world: World, http: aiohttp.ClientSession) -> None:
    door = await world.in_front_of(echo)
    for method, path in (
        ("POST", "/api/v1/users"),
        ("POST", "/api/v1/sessions"),
        ("POST", "/api/v1/sessions/refresh"),
        ("GET", "/.well-known/jwks.json"),
        ("GET", "/api/v1/media/1/variants/small?signature=x"),
        ("POST", "/api/v1/unsubscribe/x"),
        ("PUT", "/api/v1/password-resets/x"),
    ):
        async with http.request(method, door + path) as answer:
            assert answer.status == 200, (method, path)


@pytest.mark.parametrize(
    "path",
    ["/api/v1/media/../users", "/api/v1/media/%2e%2e/users", "/api/v1/media/%2E./x", "/api/v1/media/..%2fusers",
     "/api/v1/media/a%0d%0ab", "/api/v1/media/%00", "/api/v1/media/./x"],
)  # fmt: skip
async def test_paths_that_climb_are_refused(world: World, path: str) -> None:
    door = await world.in_front_of(echo)
    answer = await raw(door, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 "))


@pytest.mark.parametrize(
    "head",
    [
        b"POST /api/v1/users HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 0\r\n\r\n",
        b"POST /api/v1/users HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/v1/users HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"POST /api/v1/users HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"GET /api/v1/users/x HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
    ],
)
async def test_ambiguous_requests_are_refused(world: World, head: bytes) -> None:
    seen: list[str] = []

    async def see(request: web.Request) -> web.Response:
        seen.append(request.raw_path)
        return web.Response()

    door = await world.in_front_of(see)
    answer = await raw(door, head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    assert answer.partition(b" ")[2].startswith(b"400 ")
    assert seen == []


async def test_large_bodies_stream_both_ways(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    size = 24 * MIB
    block = os.urandom(MIB)

    async def mirror(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(size)})
        await response.prepare(request)
        async for chunk in request.content.iter_any():
            await response.write(chunk)
        return response

    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(size // MIB):
            yield block

    door = await world.in_front_of(mirror)
    digest, expected = hashlib.sha256(), hashlib.sha256(block * (size // MIB)).digest()
    async with http.post(f"{door}/api/v1/media", data=blocks(), headers=keys.bearer()) as answer:
        assert answer.status == 200
        async for chunk in answer.content.iter_any():
            digest.update(chunk)
    assert digest.digest() == expected


async def test_a_slow_service_slows_the_upload(world: World, keys: Keys) -> None:
    """The door keeps no more of a body than its buffers hold."""
    reading = asyncio.Event()
    received = 0

    async def slow(request: web.Request) -> web.Response:
        nonlocal received
        await reading.wait()
        async for chunk in request.content.iter_any():
            received += len(chunk)
        return web.Response()

    door = await world.in_front_of(slow)
    parts = urlsplit(door)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    size = 48 * MIB
    head = f"POST /api/v1/media HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n"
    writer.write((head + f"Authorization: {keys.bearer()['Authorization']}\r\n\r\n").encode())
    sent, block = 0, bytes(256 * 1024)
    try:
        while sent < size:
            writer.write(block)
            sent += len(block)
            async with asyncio.timeout(1.0):
                await writer.drain()
    except TimeoutError:
        pass
    # Sockets' own buffers take some megabytes; the rest stays with the caller.
    assert sent < 24 * MIB
    reading.set()
    while sent < size:
        writer.write(block)
        sent += len(block)
        await writer.drain()
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    assert received == size
    writer.close()


async def test_a_slow_caller_slows_the_service(world: World, keys: Keys) -> None:
    sent = 0
    ended = asyncio.Event()

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        block = bytes(256 * 1024)
        try:
            while sent < 256 * MIB:
                await response.write(block)
                sent += len(block)
        finally:
            ended.set()
        return response

    door = await world.in_front_of(flood)
    parts = urlsplit(door)
    connection = socket.create_connection((parts.hostname, parts.port))
    connection.sendall(b"GET /api/v1/media/1/original HTTP/1.1\r\nHost: x\r\n\r\n")
    steady = -1

    async def stands_still() -> bool:
        nonlocal steady
        before, steady = steady, sent
        return sent > 0 and before == sent

    await eventually(stands_still, every=0.3)
    assert sent < 32 * MIB
    # The caller goes away, and so does the request to the service.
    connection.close()
    await asyncio.wait_for(ended.wait(), 10)


async def test_events_pass_at_once(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    go = asyncio.Queue[bytes]()
    ended = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        assert request.headers["Last-Event-ID"] == "7"
        try:
            while True:
                await response.write(await go.get())
        finally:
            ended.set()

    door = await world.in_front_of(stream, request_timeout_seconds=0.5)
    async with asyncio.timeout(10):
        answer = await http.get(f"{door}/api/v1/notifications/stream", headers={**keys.bearer(), "Last-Event-ID": "7"})
        assert answer.headers["Content-Type"] == "text/event-stream"  # the head is here before any event
        for number in range(3):
            await asyncio.sleep(0.3)  # longer in all than a request may take; this is no request
            go.put_nowait(b"data: %d\n\n" % number)
            assert await answer.content.readuntil(b"\n\n") == b"data: %d\n\n" % number
        answer.close()
        await ended.wait()


async def test_a_stopping_gateway_does_not_wait_for_event_streams(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    behind = await world.service(endless)
    async with AsyncExitStack() as own:
        door = await World(own, keys).gateway(behind)
        answer = await http.get(f"{door}/api/v1/notifications/stream", headers=keys.bearer())
        assert answer.status == 200
        stopped_at = time.monotonic()
    assert time.monotonic() - stopped_at < 2
    with pytest.raises(aiohttp.ClientPayloadError):
        await answer.read()


async def test_a_stopping_gateway_finishes_an_upload_that_has_begun(world: World, keys: Keys) -> None:
    begun = asyncio.Event()

    async def reads(request: web.Request) -> web.Response:
        received = len(await request.content.readexactly(1000))
        begun.set()
        received += len(await request.read())
        return web.Response(text=str(received))

    behind = await world.service(reads)
    async with AsyncExitStack() as own:
        door = await World(own, keys).gateway(behind)
        parts = urlsplit(door)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        authorization = keys.bearer()["Authorization"]
        writer.write(
            f"POST /api/v1/media HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\n"
            "Content-Length: 3000\r\n\r\n".encode()
            + bytes(1000)
        )
        await asyncio.wait_for(begun.wait(), 5)
        stopping = asyncio.create_task(own.aclose())

        async def refuses() -> bool:
            try:
                _, another = await asyncio.open_connection(parts.hostname, parts.port)
            except ConnectionError:
                return True
            another.close()
            await another.wait_closed()
            return False

        await eventually(refuses)
        for _ in range(2):
            writer.write(bytes(1000))
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            answer = await reader.read()
            await stopping
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"3000")


async def test_an_answer_that_breaks_off_never_looks_whole(world: World, keys: Keys) -> None:
    async def breaks(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100000"} if "length" in request.query else {})
        await response.prepare(request)
        await response.write(bytes(50_000))
        assert request.transport is not None
        request.transport.abort()
        return response

    door = await world.in_front_of(breaks)
    for query in ("?length", ""):
        head = f"GET /api/v1/media/1/original{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        try:
            answer = await raw(door, head)
        except ConnectionResetError:
            continue
        assert b"200 OK" in answer.partition(b"\r\n")[0]
        assert answer.count(b"HTTP/1.1") == 1
        assert not answer.endswith(b"0\r\n\r\n")
        assert len(answer) < 60_000


async def test_another_instance_is_tried_when_one_is_not_reachable(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{unused.getsockname()[1]}"
        door = await world.gateway(gone, await world.service(echo))
        for _ in range(4):  # whoever's turn it is
            async with http.post(f"{door}/api/v1/webhooks", data=b"{}", headers=keys.bearer()) as answer:
                assert answer.status == 200
                assert (await answer.json())["bytes"] == 2


async def test_no_instance_is_503_with_a_time(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        door = await world.gateway(f"http://127.0.0.1:{unused.getsockname()[1]}")
        async with http.get(f"{door}/api/v1/media", headers=keys.bearer()) as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "1"
            assert answer.content_type == "application/problem+json"


async def test_reads_are_tried_again_and_writes_are_not(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    calls: list[str] = []

    async def drops_the_first(request: web.Request) -> web.StreamResponse:
        await request.read()
        calls.append(request.method)
        if calls.count(request.method) == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(text="done")

    door = await world.in_front_of(drops_the_first)
    async with http.get(f"{door}/api/v1/media", headers=keys.bearer()) as answer:
        assert answer.status == 200
    for method in ("POST", "PUT", "DELETE"):
        async with http.request(method, f"{door}/api/v1/media/1", data=b"x", headers=keys.bearer()) as answer:
            assert answer.status == 503
    async with http.delete(f"{door}/api/v1/media/1", headers=keys.bearer()) as answer:
        assert answer.status == 200
    assert calls == ["GET", "GET", "POST", "PUT", "DELETE", "DELETE"]


async def test_a_service_that_takes_too_long_is_504(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    cancelled = asyncio.Event()

    async def sleeps(_request: web.Request) -> web.Response:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    door = await world.in_front_of(sleeps)
    async with http.get(f"{door}/api/v1/media", headers={**keys.bearer(), "Request-Timeout": "200"}) as answer:
        assert answer.status == 504
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_a_caller_that_stops_sending_is_cut(world: World, keys: Keys) -> None:
    async def reads(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    door = await world.in_front_of(reads, idle_seconds=0.3)
    answer = await raw(
        door,
        b"POST /api/v1/media HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nConnection: close\r\n"
        + f"Authorization: {keys.bearer()['Authorization']}\r\n\r\n".encode()
        + bytes(1000),
    )
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_caller_that_goes_away_ends_the_upload(world: World, keys: Keys) -> None:
    outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def reads(request: web.Request) -> web.Response:
        received = 0
        try:
            async for chunk in request.content.iter_any():
                received += len(chunk)
            outcome.set_exception(AssertionError("the body looked whole"))
        except BaseException:
            outcome.set_result(received)
            raise
        return web.Response()

    door = await world.in_front_of(reads)
    parts = urlsplit(door)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(
        b"POST /api/v1/media HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        + f"Authorization: {keys.bearer()['Authorization']}\r\n\r\n".encode()
        + b"3e8\r\n"
        + bytes(1000)
        + b"\r\n"
    )
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    assert await asyncio.wait_for(outcome, 5) <= 1000


async def refuse(request: web.Request) -> web.Response:
    """Answers before it has read the body, as services do, and closes."""
    response = web.json_response(
        {"type": "urn:tenfold:error:too-large", "title": "Too large", "status": 413}, status=413
    )
    response.force_close()
    return response


@pytest.mark.parametrize("where", ["service", "gateway"])
@pytest.mark.parametrize("framing", ["length", "chunked", "expect"])
async def test_an_early_refusal_reaches_a_caller_that_still_sends(
    world: World, keys: Keys, tmp_path: Path, where: str, framing: str
) -> None:
    """With curl, because what counts is what a caller sees: the problem, and no broken pipe."""
    door = await world.in_front_of(refuse, upload_max_bytes=10 * MIB if where == "gateway" else 64 * MIB)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(bytes(30 * MIB))
    options = {
        "length": ["-H", "Expect:"],
        "chunked": ["-H", "Expect:", "-H", "Transfer-Encoding: chunked"],
        "expect": [],
    }
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", "-X", "POST", "-T", str(photo),
        "-H", f"Authorization: {keys.bearer()['Authorization']}", *options[framing], f"{door}/api/v1/media",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    body, _, code = out.decode().rpartition("\n")
    assert (process.returncode, code, err) == (0, "413", b"")
    assert json.loads(body)["status"] == 413


async def test_curl_uploads_with_and_without_expecting(world: World, keys: Keys, tmp_path: Path) -> None:
    door = await world.in_front_of(echo)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(os.urandom(3 * MIB))
    for options in (["-H", "Expect: 100-continue"], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked"]):
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--max-time", "20", "-X", "POST", "-T", str(photo),
            "-H", f"Authorization: {keys.bearer()['Authorization']}", *options, f"{door}/api/v1/media",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert json.loads(out)["sha256"] == hashlib.sha256(photo.read_bytes()).hexdigest()


async def test_whoever_may_not_is_told_before_being_asked_for_the_body(world: World) -> None:
    door = await world.in_front_of(echo)
    answer = await raw(
        door, b"POST /api/v1/media HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"100 Continue" not in answer


async def test_json_bodies_are_bounded(world: World, http: aiohttp.ClientSession, keys: Keys) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(1000)

    door = await world.in_front_of(echo)
    for body in (bytes(70_000), chunks()):
        async with http.post(f"{door}/api/v1/webhooks", data=body, headers=keys.bearer()) as answer:
            assert answer.status == 413


async def test_head_ranges_and_empty_answers_pass(world: World, http: aiohttp.ClientSession) -> None:
    async def media(request: web.Request) -> web.StreamResponse:
        if "If-None-Match" in request.headers:
            return web.Response(status=304, headers={"ETag": '"a"'})
        if "unbounded" in request.query:
            answer = web.StreamResponse()
            answer.enable_chunked_encoding()
            return answer
        if request.headers.get("Range") == "bytes=1-3":
            return web.Response(status=206, body=b"bcd", headers={"Content-Range": "bytes 1-3/5", "ETag": '"a"'})
        return web.Response(body=b"abcde", headers={"Accept-Ranges": "bytes", "ETag": '"a"'})

    url = await world.in_front_of(media) + "/api/v1/media/1/original"
    async with http.head(url) as answer:
        assert (answer.status, answer.headers["content-length"]) == (200, "5")
    async with http.head(f"{url}?unbounded") as answer:
        assert (answer.status, answer.headers.get("content-length")) == (200, None)
    async with http.get(url, headers={"Range": "bytes=1-3"}) as answer:
        assert (answer.status, await answer.read()) == (206, b"bcd")
        assert answer.headers["Content-Range"] == "bytes 1-3/5"
    for _ in range(2):
        async with http.get(url, headers={"If-None-Match": '"a"'}) as answer:
            assert (answer.status, answer.headers["ETag"], await answer.read()) == (304, '"a"', b"")


async def test_nothing_is_unpacked(world: World, http: aiohttp.ClientSession) -> None:
    async def packed(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "gzip"
        return web.Response(body=b"not really gzip", headers={"Content-Encoding": "gzip"})

    door = await world.in_front_of(packed)
    async with http.get(f"{door}/api/v1/media/1/original", headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert await answer.read() == b"not really gzip"


async def test_redirects_are_the_callers(world: World, http: aiohttp.ClientSession) -> None:
    async def elsewhere(_request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"})

    door = await world.in_front_of(elsewhere)
    async with http.get(f"{door}/api/v1/media/1/original", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (302, "http://127.0.0.1:1/")


async def test_the_consistency_token_travels_as_header_and_as_cookie(
    world: World, http: aiohttp.ClientSession, keys: Keys
) -> None:
    seen: list[str | None] = []

    async def service(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Consistency-Token"))
        return web.Response(headers={"Consistency-Token": "a-1f"} if request.method == "POST" else {})

    door = await world.in_front_of(service)
    async with http.post(f"{door}/api/v1/webhooks", headers=keys.bearer()) as answer:
        assert answer.headers["Consistency-Token"] == "a-1f"
        cookie = answer.headers["Set-Cookie"]
        assert cookie.startswith("tenfold_consistency=a-1f;")
        assert {"HttpOnly", "Max-Age=60", "Path=/api", "SameSite=Lax"} <= {p.strip() for p in cookie.split(";")}
    for headers, expected in (
        ({"Cookie": "tenfold_consistency=a-1f"}, "a-1f"),
        ({"Cookie": "tenfold_consistency=a-1f", "Consistency-Token": "b-2"}, "b-2"),
        ({"Cookie": 'tenfold_consistency="x y"'}, None),
    ):
        async with http.get(f"{door}/api/v1/webhooks", headers={**keys.bearer(), **headers}):
            assert seen[-1] == expected
