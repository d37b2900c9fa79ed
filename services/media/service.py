"""The use cases of the API of media, but for `uploads`. Each owns its transaction; none knows HTTP or SQL."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from msgspec import UNSET

from services.media import models, repository
from services.media.content_types import extension
from services.media.events import MediaDeleted
from services.media.models import Image, Piece, Quota, Usage, Visibility
from services.media.schemas import ChangeMedia
from services.media.settings import Settings
from services.media.signing import UrlSigner
from shared.database import Database, Transaction
from shared.errors import Forbidden, NotFound, PreconditionFailed
from shared.loader import Loader
from shared.objects import Objects
from shared.outbox import Outbox
from shared.paging import PageQuery

_REDIRECTED_SECONDS = 600
_PUBLIC_SECONDS = 600  # for so long caches still show what its owner has made private


@dataclass(frozen=True)
class Viewer:
    """Who asks for bytes, and the `expires` and `signature` of the URL, where there are any."""

    user_id: UUID | None
    expires: str
    signature: str


@dataclass(frozen=True)
class Content:
    """Bytes to deliver, which never change. A cache may keep them for `fresh_seconds`; `None`: the owner's only.

    They are the object `key`, or where there are `pieces`, what these take of it. `varies`: others get other bytes.
    """

    key: str
    content_type: str
    bytes: int
    sha256: str
    filename: str
    fresh_seconds: int | None
    pieces: tuple[Piece, ...] = ()
    varies: bool = False


@dataclass(frozen=True)
class Elsewhere:
    """A URL of the store. The redirect to it may be kept for `fresh_seconds`."""

    url: str
    fresh_seconds: int


class Media:
    def __init__(self, db: Database, outbox: Outbox, objects: Objects, signer: UrlSigner, settings: Settings) -> None:
        self._db = db
        self._rows = Loader(db, repository.get_media)
        self._outbox = outbox
        self._objects = objects
        self._signer = signer
        self._redirects = settings.redirect_to_store
        self.quota = Quota(settings.quota_bytes, settings.quota_items)

    async def get(self, owner_id: UUID, media_id: UUID) -> Image:
        return _owned(await self._rows.get(media_id), owner_id)

    async def list(self, owner_id: UUID, query: PageQuery) -> Sequence[Image]:
        """One more than asked for, where there are more."""
        return await self._db.read(repository.list_media, owner_id, query.before(), query.limit + 1)

    async def usage(self, owner_id: UUID) -> Usage:
        return await self._db.read(repository.get_usage, owner_id)

    async def change(self, owner_id: UUID, media_id: UUID, change: ChangeMedia, expected: int | None) -> Image:
        async with self._db.transaction() as tx:
            image = await self._locked(tx, owner_id, media_id, expected)
            title = image.title if change.title is UNSET else change.title
            visibility = image.visibility if change.visibility is UNSET else Visibility(change.visibility)
            if (title, visibility) == (image.title, image.visibility):
                return image
            return await repository.update_media(tx, media_id, title, visibility)

    async def delete(self, owner_id: UUID, media_id: UUID, expected: int | None) -> None:
        """The worker deletes the bytes after the commit, unless other media have the same."""
        async with self._db.transaction() as tx:
            image = await self._locked(tx, owner_id, media_id, expected)
            await repository.delete_media(tx, media_id)
            await repository.subtract_usage(tx, owner_id, image.bytes)
            await repository.release_blob(tx, image.blob_id)
            await self._outbox.add(tx, MediaDeleted(media_id=media_id, owner_id=owner_id))

    async def original(self, media_id: UUID, viewer: Viewer) -> Content:
        """As it was stored to its owner; without metadata, which tell where and by whom it was taken, to others."""
        image = await self._rows.get(media_id)
        fresh = self._permitted(image, viewer, models.original_path(media_id))
        assert image is not None
        key, filename = models.original_key(image.blob_id), f"{media_id}.{extension(image.content_type)}"
        if image.owner_id == viewer.user_id:
            return Content(key, image.content_type, image.bytes, image.sha256, filename, None, varies=True)
        if image.shown is None:
            raise NotFound("the image has not been processed, or its metadata cannot be told from the picture")
        size, sha256, pieces = image.shown.bytes, image.shown.sha256, image.shown.pieces
        return Content(key, image.content_type, size, sha256, filename, fresh, pieces, varies=True)

    async def variant(self, media_id: UUID, name: str, viewer: Viewer) -> Content:
        image = await self._rows.get(media_id)
        fresh = self._permitted(image, viewer, models.variant_path(media_id, name))
        assert image is not None
        variant = image.variant(name)
        if variant is None:
            raise NotFound
        key = models.variant_key(image.blob_id, name)
        return Content(key, models.VARIANT_TYPE, variant.bytes, variant.sha256, f"{media_id}-{name}.webp", fresh)

    def stream(self, content: Content, start: int, length: int) -> AsyncIterator[bytes]:
        """The bytes in pieces. Raises `FileNotFoundError` when they have been deleted meanwhile."""
        if content.pieces:
            return self._composed(content, start, length)
        return self._objects.stream(content.key, start, length)

    async def _composed(self, content: Content, start: int, length: int) -> AsyncIterator[bytes]:
        for piece in models.cut(content.pieces, start, length):
            if isinstance(piece, bytes):
                yield piece
            else:
                async for part in self._objects.stream(content.key, *piece):
                    yield part

    def path(self, content: Content) -> Path | None:
        """The file that the content is, in a store that has files."""
        return None if content.pieces else self._objects.path(content.key)

    async def elsewhere(self, content: Content) -> Elsewhere | None:
        """Where the store itself delivers the content; `None` when it does not.

        Only what others may see and is an object of its own, which are variants: of those we know the type that the
        store gives.
        """
        if not self._redirects or content.fresh_seconds is None or content.pieces:
            return None
        seconds = min(content.fresh_seconds, _REDIRECTED_SECONDS)
        url = await self._objects.presign_get(content.key, timedelta(seconds=seconds))
        return None if url is None else Elsewhere(url, seconds // 2)

    def signed_url(self, path: str) -> str:
        return self._signer.sign(path)

    def _permitted(self, image: Image | None, viewer: Viewer, path: str) -> int | None:
        """For how long caches may keep it. Raises `NotFound` where the viewer may not know of it."""
        if image is None:
            raise NotFound
        if image.visibility is Visibility.PUBLIC:
            return _PUBLIC_SECONDS
        if viewer.signature:
            left = self._signer.seconds_left(path, viewer.expires, viewer.signature)
            if left is not None and left > 0:
                return left
            if left is not None and image.owner_id != viewer.user_id:
                raise Forbidden("this URL has expired")
        _owned(image, viewer.user_id)
        return None

    async def _locked(self, tx: Transaction, owner_id: UUID, media_id: UUID, expected: int | None) -> Image:
        image = _owned(await repository.get_media_for_update(tx, media_id), owner_id)
        if expected is not None and expected != image.version:
            raise PreconditionFailed
        return image


def _owned(image: Image | None, owner_id: UUID | None) -> Image:
    if image is None or image.owner_id != owner_id:
        raise NotFound
    return image
