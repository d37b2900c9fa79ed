"""One reading of every request: what two parsers could read differently is refused, nothing arrives twice.

The corpus follows James Kettle, "HTTP Desync Attacks" (2019), and RFC 9112, sections 2.2, 5.2, 6.3, 7.1 and 11.2.
"""

import asyncio
import json
import re
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from tests.integration.gateway.conftest import World

PATH = b"/api/v1/password-resets/x"
HIDDEN = b"GET /api/v1/password-resets/hidden HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST " + PATH + b" HTTP/1.1\r\nHost: x\r\n"
IN_A_CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
LAST = b"POST /api/v1/password-resets/last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

# Each is answered by 400 and the end of the connection: what follows it must not be read at all.
REFUSED: dict[str, bytes] = {
    "CL.TE": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "TE.CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + IN_A_CHUNK,
    "TE.TE": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
    "TE that is not chunked last": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n" + HIDDEN,
    "TE of another name": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "TE after a vertical tab": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "lengths in a list": POST + b"Content-Length: 0, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "a signed length": POST + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    "a hexadecimal length": POST + b"Content-Length: 0x0\r\n\r\n" + HIDDEN,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + HIDDEN,
    "two hosts": b"GET " + PATH + b" HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" + HIDDEN,
    "obs-fold": POST + b"Content-Length: 0\r\nX: a\r\n b\r\n\r\n" + HIDDEN,
    "a folded framing header": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "bare CR in a value": POST + b"Content-Length: 0\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n" + HIDDEN,
    "NUL in a value": POST + b"Content-Length: 0\r\nX: a\x00b\r\n\r\n" + HIDDEN,
    "an empty name": POST + b"Content-Length: 0\r\n: x\r\n\r\n" + HIDDEN,
    "a line without a colon": POST + b"Content-Length: 0\r\nx\r\n\r\n" + HIDDEN,
    "a space in the target": b"GET " + PATH + b" /y HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN,
    "another version": b"GET " + PATH + b" HTTP/3.7\r\nHost: x\r\n\r\n" + HIDDEN,
    "a chunk size that is no number": POST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + HIDDEN,
    "a signed chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + HIDDEN,
    "a chunk size too large": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n" + HIDDEN,
    "a chunk longer than it says": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + HIDDEN,
    "a bare LF after a chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n0\n\r\n" + HIDDEN,
    "a bare LF in a chunk extension": POST + b"Transfer-Encoding: chunked\r\n\r\n2;\nab\r\n0\r\n\r\n" + HIDDEN,
    "bare LFs between headers": POST.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n" + HIDDEN,
}  # fmt: skip

# What is no attack, and how many requests it is: bytes that look like a request in a body stay a body.
WHOLE: dict[str, tuple[bytes, int]] = {
    "a request as a body": (POST + b"Content-Length: %d\r\n\r\n%s" % (len(HIDDEN), HIDDEN), 1),
    "a request in a chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + IN_A_CHUNK, 1),
    "chunk extensions": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\n\r\n", 1),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: y\r\n\r\n", 1),
    "pipelined": ((POST + b"Content-Length: 1\r\n\r\nx") * 3, 3),
    "GET with a body": (POST.replace(b"POST", b"GET") + b"Content-Length: %d\r\n\r\n%s" % (len(HIDDEN), HIDDEN), 1),
}  # fmt: skip


async def exchange(base: str, said: bytes) -> bytes:
    """What is answered until the gateway closes the connection, or nothing more comes."""
    parts = urlsplit(base)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    received = b""
    try:
        async with asyncio.timeout(10):
            writer.write(said)
            while data := await reader.read(65536):
                received += data
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return received


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answers)]


async def test_what_can_be_read_two_ways_is_refused_and_ends_the_connection(world: World) -> None:
    seen: list[str] = []

    async def see(request: web.Request) -> web.Response:
        await request.read()
        seen.append(request.raw_path)
        return web.Response(text="seen")

    door = await world.in_front_of(see)
    answers = await asyncio.gather(*(exchange(door, said) for said in REFUSED.values()))
    wrong = {
        name: answer
        for name, answer in zip(REFUSED, answers, strict=True)
        if statuses(answer)[:1] != [400] or 200 in statuses(answer)
    }
    assert wrong == {}
    for name, answer in zip(REFUSED, answers, strict=True):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"Content-Type: application/problem+json\r\n" in head, name
        assert b"X-Request-Id: " in head, name
        assert b"Server: " not in head, name
        assert json.loads(body)["status"] == 400, name
    assert seen == []


@pytest.mark.parametrize("name", WHOLE)
async def test_what_is_whole_arrives_once(world: World, name: str) -> None:
    seen: list[str] = []

    async def see(request: web.Request) -> web.Response:
        await request.read()
        seen.append(request.raw_path)
        return web.Response(text="seen")

    door = await world.in_front_of(see)
    said, times = WHOLE[name]
    assert statuses(await exchange(door, said + LAST)) == [200] * (times + 1)
    assert seen == [PATH.decode()] * times + ["/api/v1/password-resets/last"]
