"""Parse, one call to the service, answer."""

import socket
from collections.abc import AsyncIterator
from uuid import UUID

from aiohttp import BodyPartReader, MultipartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from services.media import schemas
from services.media.delivery import deliver
from services.media.errors import EmptyUpload
from services.media.models import Image
from services.media.service import Media, Viewer
from services.media.uploads import Uploads
from shared.application import NO_CONTENT, Call, Reply, etag
from shared.errors import Malformed, TooLarge, UnsupportedType
from shared.paging import Page, PageQuery, page

_CHUNK_BYTES = 64 * 1024
# Of the kernel, which doubles it. Enough for the gateway next door (at a millisecond some 100 MB/s a connection).
_RECEIVED_BYTES = 64 * 1024
_OTHER_FIELDS_BYTES = 16 * 1024
_MULTIPART = "multipart/form-data"


class Handlers:
    def __init__(self, media: Media, uploads: Uploads) -> None:
        self._media = media
        self._uploads = uploads

    async def upload(self, call: Call) -> Reply[schemas.Media]:
        """Upload an image, as the body itself or as the field `file` of a form"""
        _require_acceptable(call.request)
        _take_small_pieces(call.request)
        declared = None if call.request.content_type == _MULTIPART else call.request.content_length
        image = await self._uploads.upload(call.user_id, _body(call.request), declared, call.once)
        return self._accepted(image)

    async def create_upload(self, call: Call, body: schemas.CreateUpload) -> Reply[schemas.Upload]:
        """Announce an upload whose bytes go straight to the store"""
        upload = await self._uploads.create(call.user_id, body, call.once())
        to = await self._uploads.destination(upload)
        return Reply(schemas.Upload(upload.id, to.url, "PUT", to.headers, upload.expires_at))

    async def receive_upload(self, call: Call, upload_id: UUID, query: schemas.Signature) -> Reply[None]:
        """The bytes of an announced upload, where the store takes none itself"""
        _require_uncompressed(call.request)
        _take_small_pieces(call.request)
        await self._uploads.receive(upload_id, query.expires, query.signature, _pieces(call.request))
        return NO_CONTENT

    async def complete_upload(self, call: Call, upload_id: UUID) -> Reply[schemas.Media]:
        """The bytes have been sent: make an image of them"""
        return self._accepted(await self._uploads.complete(call.user_id, upload_id))

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
        """The image as it was uploaded; for others than its owner without metadata"""
        content = await self._media.original(media_id, _viewer(call, query))
        return await deliver(call.request, content, self._media)

    async def get_variant(self, call: Call, media_id: UUID, name: str, query: schemas.Signature) -> web.StreamResponse:
        """A variant of the image, as WebP and without metadata"""
        content = await self._media.variant(media_id, name, _viewer(call, query))
        return await deliver(call.request, content, self._media)

    def _render(self, image: Image) -> schemas.Media:
        return schemas.Media.of(image, self._media.signed_url)

    def _accepted(self, image: Image) -> Reply[schemas.Media]:
        return self._reply(image, {"Location": f"/api/v1/media/{image.id}"})

    def _reply(self, image: Image, headers: dict[str, str] | None = None) -> Reply[schemas.Media]:
        # Not as the reply's version, which would be answered by a 304: of an image that has not changed the signed URLs
        # have, and those that the caller has may have expired.
        return Reply(self._render(image), headers={hdrs.ETAG: etag(image.version), **(headers or {})})


def _viewer(call: Call, query: schemas.Signature) -> Viewer:
    principal = call.maybe_principal
    return Viewer(principal.user_id if principal else None, query.expires, query.signature)


def _require_acceptable(request: web.Request) -> None:
    """Coarse: what the content is, its bytes say."""
    declared = request.content_type
    if not (declared.startswith("image/") or declared in ("application/octet-stream", _MULTIPART)):
        raise UnsupportedType(f"send an image, or {_MULTIPART} with the field file")
    _require_uncompressed(request)


def _require_uncompressed(request: web.Request) -> None:
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        raise UnsupportedType("send the image uncompressed")


def _take_small_pieces(request: web.Request) -> None:
    """An upload in hand holds some three pieces of what one read gives, which is 256 KiB where the socket lets it."""
    if request.transport is not None:
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVED_BYTES)


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes, without joining or copying."""
    if not request.body_exists:
        return  # what stands for no body gives empty chunks for ever
    async for chunk, _ in request.content.iter_chunks():
        if chunk:
            yield chunk


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    if request.content_type != _MULTIPART:
        async for chunk in _pieces(request):
            yield chunk
        return
    try:
        form = await request.multipart()
        part = await _file_part(form)
        while chunk := await part.read_chunk(_CHUNK_BYTES):
            yield chunk
        await form.next()  # raises unless a boundary ended the file: what was cut off must not pass for whole
    except (ValueError, AssertionError, HttpProcessingError) as error:
        raise Malformed(f"not a form: {error}") from None


async def _file_part(form: MultipartReader) -> BodyPartReader:
    """The field `file` of a form; fields before it are passed over, up to a bound."""
    skipped = 0
    while (part := await _next_part(form)) is not None:
        if not isinstance(part, BodyPartReader):
            raise Malformed("nested multipart")
        if part.name == "file":
            return part
        while chunk := await part.read_chunk(_CHUNK_BYTES):
            skipped += len(chunk)
            if skipped > _OTHER_FIELDS_BYTES:
                raise TooLarge("the form's other fields are too large")
    raise EmptyUpload


async def _next_part(form: MultipartReader) -> BodyPartReader | MultipartReader | None:
    try:
        return await form.next()
    except RuntimeError as error:  # aiohttp's for a field `_charset_` that names none
        raise Malformed(f"not a form: {error}") from None
