"""Parse, one call to the service, answer."""

from collections.abc import AsyncIterator
from uuid import UUID

from aiohttp import BodyPartReader, hdrs, web

from services.media import ranges, schemas
from services.media.errors import EmptyUpload
from services.media.models import Image
from services.media.service import Content, Media, Viewer
from shared.application import NO_CONTENT, Call, Reply
from shared.errors import Malformed, NotFound, TooLarge, UnsupportedType
from shared.paging import Page, PageQuery, page

_CHUNK_BYTES = 64 * 1024
_OTHER_FIELDS_BYTES = 16 * 1024
_MULTIPART = "multipart/form-data"


class Handlers:
    def __init__(self, media: Media) -> None:
        self._media = media

    async def upload(self, call: Call) -> Reply[schemas.Media]:
        """Upload an image, as the body itself or as the field `file` of a form"""
        _require_acceptable(call.request)
        declared = None if call.request.content_type == _MULTIPART else call.request.content_length
        image = await self._media.upload(call.user_id, _body(call.request), declared, call.once)
        return self._reply(image, {"Location": f"/api/v1/media/{image.id}"})

    async def list_media(self, call: Call, query: PageQuery) -> Reply[Page[schemas.Media]]:
        """List the own media"""
        found = await self._media.list(call.user_id, query)
        return Reply(page(found, query, self._render, lambda image: image.id))

    async def get_usage(self, call: Call) -> Reply[schemas.Usage]:
        """How much of the quota is used"""
        return Reply(schemas.Usage.of(await self._media.usage(call.user_id), self._media.quota))

    async def get_media(self, call: Call, media_id: UUID) -> Reply[schemas.Media]:
        """One of the own media"""
        return self._reply(await self._media.get(call.user_id, media_id))

    async def change_media(self, call: Call, media_id: UUID, body: schemas.ChangeMedia) -> Reply[schemas.Media]:
        """Change title or visibility"""
        return self._reply(await self._media.change(call.user_id, media_id, body, call.expected_version()))

    async def delete_media(self, call: Call, media_id: UUID) -> Reply[None]:
        """Delete an image and its variants"""
        await self._media.delete(call.user_id, media_id, call.expected_version())
        return NO_CONTENT

    async def get_original(self, call: Call, media_id: UUID, query: schemas.Signature) -> web.StreamResponse:
        """The image as it was uploaded"""
        return await self._deliver(call.request, await self._media.original(media_id, _viewer(call, query)))

    async def get_variant(self, call: Call, media_id: UUID, name: str, query: schemas.Signature) -> web.StreamResponse:
        """A variant of the image, as WebP"""
        return await self._deliver(call.request, await self._media.variant(media_id, name, _viewer(call, query)))

    def _render(self, image: Image) -> schemas.Media:
        return schemas.Media.of(image, self._media.signed_url)

    def _reply(self, image: Image, headers: dict[str, str] | None = None) -> Reply[schemas.Media]:
        return Reply(self._render(image), image.version, headers or {})

    async def _deliver(self, request: web.Request, content: Content) -> web.StreamResponse:
        tag = f'"{content.sha256}"'
        headers = {
            hdrs.ETAG: tag,
            hdrs.CACHE_CONTROL: _cache_control(content.fresh_seconds),
            hdrs.ACCEPT_RANGES: "bytes",
            hdrs.CONTENT_DISPOSITION: f'inline; filename="{content.filename}"',
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cross-Origin-Resource-Policy": "cross-origin",
        }
        if ranges.matches(request.headers.get(hdrs.IF_NONE_MATCH), tag):
            return web.Response(status=304, headers=headers)
        if_range = request.headers.get(hdrs.IF_RANGE)
        asked = request.headers.get(hdrs.RANGE) if if_range in (None, tag) else None
        span = ranges.parse(asked, content.bytes) if request.method == hdrs.METH_GET else None
        response = web.StreamResponse(status=206 if span else 200, headers=headers)
        if span:
            response.headers[hdrs.CONTENT_RANGE] = span.content_range(content.bytes)
        start, length = span or (0, content.bytes)
        response.content_type = content.content_type
        response.content_length = length
        if request.method == hdrs.METH_HEAD:
            await response.prepare(request)
            return response
        try:
            async for piece in self._media.stream(content, start, length):
                if not response.prepared:  # not before there is something: what is gone is a 404
                    await response.prepare(request)
                await response.write(piece)
        except FileNotFoundError:
            if response.prepared:
                raise
            raise NotFound from None
        await response.write_eof()
        return response


def _cache_control(fresh_seconds: int | None) -> str:
    if fresh_seconds is None:
        return "private, no-cache"
    return f"public, max-age={fresh_seconds}, immutable"


def _viewer(call: Call, query: schemas.Signature) -> Viewer:
    principal = call.maybe_principal
    return Viewer(principal.user_id if principal else None, query.expires, query.signature)


def _require_acceptable(request: web.Request) -> None:
    """Coarse: what the content is, its bytes say."""
    declared = request.content_type
    if not (declared.startswith("image/") or declared in ("application/octet-stream", _MULTIPART)):
        raise UnsupportedType(f"send an image, or {_MULTIPART} with the field file")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        raise UnsupportedType("send the image uncompressed")


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    if request.content_type != _MULTIPART:
        async for chunk in request.content.iter_any():
            yield chunk
        return
    part = await _file_part(request)
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        yield chunk


async def _file_part(request: web.Request) -> BodyPartReader:
    """The field `file` of a form; fields before it are passed over, up to a bound."""
    skipped = 0
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            if not isinstance(part, BodyPartReader):
                raise Malformed("nested multipart")
            if part.name == "file":
                return part
            while chunk := await part.read_chunk(_CHUNK_BYTES):
                skipped += len(chunk)
                if skipped > _OTHER_FIELDS_BYTES:
                    raise TooLarge("the form's other fields are too large")
    except (ValueError, AssertionError) as error:
        raise Malformed(f"not a form: {error}") from None
    raise EmptyUpload
