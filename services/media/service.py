"""The use cases of the API of media. Each owns its transaction; none knows HTTP or SQL."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from msgspec import UNSET

from services.media import models, repository
from services.media.blobs import Intake, Sweeper
from services.media.content_types import extension
from services.media.errors import QuotaExceeded, UploadTimeout
from services.media.events import MediaDeleted, MediaUploaded
from services.media.models import Image, Quota, Usage, Visibility
from services.media.schemas import ChangeMedia
from services.media.settings import Settings
from services.media.signing import UrlSigner
from shared import metrics
from shared.database import Database, Transaction
from shared.errors import Forbidden, NotFound, PreconditionFailed, TooLarge
from shared.idempotency import Once
from shared.ids import new_id
from shared.loader import Loader
from shared.objects import Objects
from shared.outbox import Outbox
from shared.paging import PageQuery

UPLOADED = metrics.Counter("tenfold_media_uploaded_bytes_total", "Bytes of accepted uploads")

_GRACE_SECONDS = 300.0  # the sweeper must not come before an upload has ended for sure
_FOREVER_SECONDS = 365 * 24 * 3600


@dataclass(frozen=True)
class Viewer:
    """Who asks for bytes, and the `expires` and `signature` of the URL, where there are any."""

    user_id: UUID | None
    expires: str
    signature: str


@dataclass(frozen=True)
class Content:
    """Bytes to deliver, which never change. A cache may keep them for `fresh_seconds`; `None`: the owner's only."""

    key: str
    content_type: str
    bytes: int
    sha256: str
    filename: str
    fresh_seconds: int | None


class Media:
    def __init__(
        self,
        db: Database,
        outbox: Outbox,
        objects: Objects,
        sweeper: Sweeper,
        signer: UrlSigner,
        settings: Settings,
    ) -> None:
        self._db = db
        self._rows = Loader(db, repository.get_media)
        self._outbox = outbox
        self._objects = objects
        self._sweeper = sweeper
        self._signer = signer
        self._settings = settings
        self.quota = Quota(settings.quota_bytes, settings.quota_items)

    async def upload(
        self, owner_id: UUID, chunks: AsyncIterator[bytes], declared: int | None, once: Callable[[bytes], Once]
    ) -> Image:
        """Store an image and have it processed. `declared` is the size in bytes, where known; `once` gets the hash.

        Raises `NotAnImage`, `EmptyUpload` (nothing has been stored then), `TooLarge`, `QuotaExceeded`, `UploadTimeout`.
        """
        if declared is not None and declared > self._settings.upload_max_bytes:
            raise TooLarge(_limit(self._settings))
        used = await self._db.read(repository.get_usage, owner_id)
        if not self.quota.allows(Usage(used.bytes + (declared or 1), used.items + 1)):
            raise QuotaExceeded
        intake = Intake(chunks, self._settings.upload_max_bytes, self._settings.upload_stall_seconds)
        content_type = await intake.sniff()
        blob_id = new_id()
        async with self._db.transaction() as tx:
            await repository.announce_blob(tx, blob_id, self._settings.upload_seconds + _GRACE_SECONDS)
        try:
            await self._store(blob_id, intake)
            image = await self._register(owner_id, blob_id, content_type, intake, once)
        except BaseException:
            # Also when the caller went away, which cancels this task. What cannot be done now the worker's sweep does.
            await asyncio.shield(self._sweeper.discard(blob_id))
            raise
        if image.blob_id != blob_id:
            await self._sweeper.discard(blob_id)  # the same bytes are there already
        return image

    async def _store(self, blob_id: UUID, intake: Intake) -> None:
        try:
            async with asyncio.timeout(self._settings.upload_seconds):
                await self._objects.put(models.original_key(blob_id), intake, seconds=self._settings.upload_seconds)
        except TimeoutError:
            raise UploadTimeout from None

    async def _register(
        self, owner_id: UUID, blob_id: UUID, content_type: str, intake: Intake, make_once: Callable[[bytes], Once]
    ) -> Image:
        sha256 = intake.sha256()
        once = make_once(sha256.encode())
        async with self._db.transaction() as tx:
            if (earlier := await once.find(tx, Image)) is not None:
                return earlier
            if not self.quota.allows(await repository.add_usage(tx, owner_id, intake.bytes)):
                raise QuotaExceeded
            used = await repository.use_blob(tx, blob_id, sha256)
            if used is None:
                raise UploadTimeout
            image = await repository.insert_media(tx, new_id(), owner_id, used, content_type, intake.bytes, sha256)
            await self._outbox.add(
                tx,
                MediaUploaded(
                    media_id=image.id,
                    owner_id=owner_id,
                    blob_id=used,
                    sha256=sha256,
                    content_type=content_type,
                    bytes=image.bytes,
                ),
            )
            await once.keep(tx, image)
        UPLOADED.inc(image.bytes)
        return image

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
        image = await self._rows.get(media_id)
        fresh = self._permitted(image, viewer, models.original_path(media_id))
        assert image is not None
        filename = f"{media_id}.{extension(image.content_type)}"
        key = models.original_key(image.blob_id)
        return Content(key, image.content_type, image.bytes, image.sha256, filename, fresh)

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
        return self._objects.stream(content.key, start, length)

    def signed_url(self, media_id: UUID, name: str) -> str:
        return self._signer.sign(models.variant_path(media_id, name))

    def _permitted(self, image: Image | None, viewer: Viewer, path: str) -> int | None:
        """For how long caches may keep it. Raises `NotFound` where the viewer may not know of it."""
        if image is None:
            raise NotFound
        if image.visibility is Visibility.PUBLIC:
            return _FOREVER_SECONDS
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


def _limit(settings: Settings) -> str:
    return f"at most {settings.upload_max_bytes} bytes are taken"
