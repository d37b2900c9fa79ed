"""Content as HTTP answers: conditions, ranges, redirects to the store, and files sent by the kernel."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

from aiohttp import hdrs, web

from services.media import ranges
from services.media.ranges import Span
from services.media.service import Content, Media
from shared.errors import NotFound

_FIRST_BYTES = 128 * 1024  # go with the head; what is no larger needs nothing else


async def deliver(request: web.Request, content: Content, media: Media) -> web.StreamResponse:
    tag = f'"{content.sha256}"'
    headers = {
        hdrs.ETAG: tag,
        hdrs.CACHE_CONTROL: _cache_control(content.fresh_seconds),
        hdrs.ACCEPT_RANGES: "bytes",
        hdrs.CONTENT_DISPOSITION: f'inline; filename="{content.filename}"',
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    if content.varies:
        headers[hdrs.VARY] = hdrs.AUTHORIZATION
    if ranges.matches(request.headers.get(hdrs.IF_NONE_MATCH), tag):
        return web.Response(status=304, headers=headers)
    if (elsewhere := await media.elsewhere(content)) is not None:
        kept = {hdrs.LOCATION: elsewhere.url, hdrs.CACHE_CONTROL: _cache_control(elsewhere.fresh_seconds)}
        return web.Response(status=307, headers=kept)
    if_range = request.headers.get(hdrs.IF_RANGE)
    asked = request.headers.get(hdrs.RANGE) if if_range in (None, tag) else None
    spans = ranges.parse(asked, content.bytes) if request.method == hdrs.METH_GET else []
    if len(spans) > 1:
        return await _send_several(request, content, media, spans, headers)
    response = web.StreamResponse(status=206 if spans else 200, headers=headers)
    span = Span(0, content.bytes)
    if spans:
        span = spans[0]
        response.headers[hdrs.CONTENT_RANGE] = span.content_range(content.bytes)
    response.content_type = content.content_type
    response.content_length = span.length
    if request.method == hdrs.METH_HEAD:
        await response.prepare(request)
    elif (path := media.path(content)) is not None:
        await _send_file(request, response, path, span)
    else:
        await _send(request, response, media.stream(content, *span))
    return response


async def _send(request: web.Request, response: web.StreamResponse, pieces: AsyncIterator[bytes]) -> None:
    """Raises `NotFound` when there is nothing (any more)."""
    try:
        async for piece in pieces:
            if not response.prepared:  # not before there is something: what is gone is a 404
                await response.prepare(request)
            await response.write(piece)
    except FileNotFoundError:
        if response.prepared:
            raise
        raise NotFound from None
    await response.write_eof()


async def _send_several(
    request: web.Request, content: Content, media: Media, spans: list[Span], headers: dict[str, str]
) -> web.StreamResponse:
    """As `multipart/byteranges`, RFC 9110 section 14.6."""
    boundary = uuid4().hex
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: {content.content_type}\r\n"
        f"Content-Range: {span.content_range(content.bytes)}\r\n\r\n".encode()
        for span in spans
    ]
    end = f"\r\n--{boundary}--\r\n".encode()
    response = web.StreamResponse(status=206, headers=headers)
    response.headers[hdrs.CONTENT_TYPE] = f"multipart/byteranges; boundary={boundary}"
    response.content_length = sum(map(len, heads)) + sum(span.length for span in spans) + len(end)

    async def body() -> AsyncIterator[bytes]:
        for head, span in zip(heads, spans, strict=True):
            pieces = media.stream(content, *span)
            yield head + await anext(pieces)
            async for piece in pieces:
                yield piece
        yield end

    await _send(request, response, body())
    return response


async def _send_file(request: web.Request, response: web.StreamResponse, path: Path, span: Span) -> None:
    """From the file to the socket without passing through Python. Raises `NotFound`.

    By hand, because uvloop has no `sendfile`.
    """
    try:
        file = await asyncio.to_thread(os.open, path, os.O_RDONLY)
    except FileNotFoundError:
        raise NotFound from None
    try:
        first = await asyncio.to_thread(os.pread, file, min(span.length, _FIRST_BYTES), span.start)
        await response.prepare(request)
        transport = request.transport
        rest = Span(span.start + len(first), span.length - len(first))
        if transport is None or not rest.length:
            await response.write(first)
        else:
            transport.set_write_buffer_limits(0)  # so that the write ends when all of it is in the socket
            await response.write(first)
            await _sendfile(transport.get_extra_info("socket").fileno(), file, rest)
            transport.set_write_buffer_limits()
        await response.write_eof()
    finally:
        os.close(file)


async def _sendfile(connection: int, file: int, span: Span) -> None:
    """The transport of `connection` must have nothing left to write."""
    loop = asyncio.get_running_loop()
    socket = os.dup(connection)  # a loop does not let its transports' own descriptors be waited for
    position, left = span
    try:
        while left:
            writable: asyncio.Future[None] = loop.create_future()
            loop.add_writer(socket, _wake, writable)
            try:
                await writable
            finally:
                loop.remove_writer(socket)
            # In a thread, because the file may have to be read from a disk. It never waits for the socket.
            sending = asyncio.ensure_future(asyncio.to_thread(_some, socket, file, position, left))
            try:
                sent = await asyncio.shield(sending)
            except asyncio.CancelledError:
                await asyncio.wait([sending])  # the descriptors are its until then
                raise
            position, left = position + sent, left - sent
    finally:
        os.close(socket)


def _wake(writable: "asyncio.Future[None]") -> None:
    if not writable.done():
        writable.set_result(None)


def _some(socket: int, file: int, position: int, most: int) -> int:
    try:
        sent = os.sendfile(socket, file, position, most)
    except BlockingIOError:
        return 0
    if sent == 0:
        raise EOFError("the file is shorter than it was")
    return sent


def _cache_control(fresh_seconds: int | None) -> str:
    if fresh_seconds is None:
        return "private, no-cache"
    return f"public, max-age={fresh_seconds}, must-revalidate"
