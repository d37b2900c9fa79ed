"""The use cases of uploading: through the API, or straight to the store.

What goes straight to the store lands where the client may write, `incoming/<id>`, and stays in its hands until the URL
expires. So it is copied first and read, hashed and judged after that: what was judged cannot be changed any more.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from uuid import UUID

from services.media import models, repository
from services.media.blobs import Intake, Sweeper
from services.media.errors import QuotaExceeded, UploadCompleted, UploadIncomplete, UploadTimeout
from services.media.events import MediaUploaded
from services.media.models import Image, Quota, Upload, Usage
from services.media.schemas import CreateUpload
from services.media.settings import Settings
from services.media.signing import UrlSigner
from shared import forgetting, metrics
from shared.clock import Clock
from shared.database import Connection, Database, Transaction
from shared.errors import Forbidden, NotFound, TooLarge, Unauthenticated
from shared.idempotency import Once
from shared.ids import new_id
from shared.objects import Objects, Presigned
from shared.outbox import Outbox

UPLOADED = metrics.Counter("tenfold_media_uploaded_bytes_total", "Bytes of accepted uploads")

_GRACE_SECONDS = 300.0  # the sweeper must not come before an upload has ended for sure

# In the transaction that makes an image: what an earlier request has made already, and that this one has made it.
Find = Callable[[Transaction, str], Awaitable[Image | None]]
Keep = Callable[[Transaction, Image], Awaitable[None]]


class Uploads:
    def __init__(
        self,
        db: Database,
        outbox: Outbox,
        objects: Objects,
        sweeper: Sweeper,
        signer: UrlSigner,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._db = db
        self._outbox = outbox
        self._objects = objects
        self._sweeper = sweeper
        self._signer = signer
        self._settings = settings
        self._clock = clock
        self._quota = Quota(settings.quota_bytes, settings.quota_items)

    async def upload(
        self, owner_id: UUID, chunks: AsyncIterator[bytes], declared: int | None, make_once: Callable[[bytes], Once]
    ) -> Image:
        """Store an image and have it processed. `declared` is the size, where known; `make_once` gets the hash.

        Raises `NotAnImage`, `EmptyUpload` (nothing has been stored then), `TooLarge`, `QuotaExceeded`, `UploadTimeout`.
        """
        if make_once(b"").key is None:  # with a key it may be the very upload that filled the quota, sent again
            await self._require_room(owner_id, declared or 1)
        intake = self._intake(chunks, self._settings.upload_max_bytes)
        content_type = await intake.sniff()
        once: list[Once] = []

        async def store(key: str) -> str:
            await self._put(key, intake, declared)
            return content_type

        async def find(tx: Transaction, sha256: str) -> Image | None:
            once.append(make_once(sha256.encode()))
            return await once[0].find(tx, Image)

        async def keep(tx: Transaction, image: Image) -> None:
            await once[0].keep(tx, image)

        return await self._add(owner_id, intake, store, find, keep)

    async def create(self, owner_id: UUID, new: CreateUpload, once: Once) -> Upload:
        """Announce an upload straight to the store. Raises `TooLarge` or `QuotaExceeded`; earlier ones count too."""
        if new.bytes > self._settings.upload_max_bytes:
            raise TooLarge(_limit(self._settings))
        async with self._db.transaction() as tx:
            if await forgetting.is_forgotten(tx, owner_id):
                raise Unauthenticated("the account is gone")
            if (earlier := await once.find(tx, Upload)) is not None:
                return earlier
            used = await repository.get_usage_with_uploads(tx, owner_id)
            if not self._quota.allows(Usage(used.bytes + new.bytes, used.items + 1)):
                raise QuotaExceeded
            upload = await repository.insert_upload(
                tx,
                new_id(),
                owner_id,
                new.content_type,
                new.bytes,
                self._settings.presigned_seconds,
                self._settings.upload_seconds + _GRACE_SECONDS,
            )
            await once.keep(tx, upload)
        return upload

    async def destination(self, upload: Upload) -> Presigned:
        """Where the bytes are to be sent: to the store itself where that can sign URLs, else to this API."""
        left = max(upload.expires_at - self._clock.now(), timedelta(seconds=1))
        presigned = await self._objects.presign_put(models.incoming_key(upload.id), left)
        if presigned is None:
            path = models.upload_path(upload.id)
            presigned = Presigned(self._signer.sign_until(path, int(upload.expires_at.timestamp())), {})
        return Presigned(presigned.url, {"Content-Type": upload.content_type, **presigned.headers})

    async def receive(self, upload_id: UUID, expires: str, signature: str, chunks: AsyncIterator[bytes]) -> None:
        """Take the bytes of an upload from who has its signed URL; again, until the upload is complete."""
        left = self._signer.seconds_left(models.upload_path(upload_id), expires, signature)
        if left is None:
            raise NotFound
        async with self._db.transaction() as tx:  # the sender has no consistency token
            upload = await repository.get_upload(tx, upload_id)
        if upload is None:
            raise NotFound
        if not left:
            raise Forbidden("this URL has expired")
        if upload.media_id is not None:
            raise UploadCompleted
        intake = self._intake(chunks, upload.bytes)
        await intake.sniff()
        await self._put(models.incoming_key(upload_id), intake, None)

    async def complete(self, owner_id: UUID, upload_id: UUID) -> Image:
        """Have what was sent to the store processed; a second call answers as the first.

        Raises `UploadIncomplete`, `TooLarge`, `NotAnImage`, `QuotaExceeded`; the bytes can be sent again then.
        """
        upload = await self._db.read(repository.get_upload, upload_id)
        if upload is None or upload.owner_id != owner_id:
            raise NotFound
        if upload.media_id is not None:
            return await self._completed(upload.media_id)
        sent = await self._objects.head(models.incoming_key(upload_id))
        if sent is not None and sent.bytes > self._settings.upload_max_bytes:
            raise TooLarge(_limit(self._settings))
        if sent is None or sent.bytes != upload.bytes:
            raise UploadIncomplete(f"{sent.bytes if sent else 0} of {upload.bytes} bytes have been sent")
        blob_id = new_id()
        intake = self._intake(self._objects.stream(models.original_key(blob_id), 0, upload.bytes), upload.bytes)

        async def store(key: str) -> str:
            try:
                await self._objects.copy(models.incoming_key(upload_id), key)
            except FileNotFoundError:
                raise UploadIncomplete from None
            copied = await self._objects.head(key)
            if copied is None or copied.bytes != upload.bytes:  # sent again, of another size, while we asked
                raise UploadIncomplete
            content_type = await intake.sniff()
            async for _ in intake:
                pass
            return content_type

        async def find(tx: Transaction, _sha256: str) -> Image | None:
            locked = await repository.get_upload_for_update(tx, upload_id)
            if locked is None:
                raise NotFound
            return await _existing(tx, locked.media_id) if locked.media_id else None

        async def keep(tx: Transaction, image: Image) -> None:
            await repository.complete_upload(tx, upload_id, image.id)

        return await self._add(owner_id, intake, store, find, keep, blob_id)

    async def _completed(self, media_id: UUID) -> Image:
        return await self._db.read(_existing, media_id)

    def _intake(self, chunks: AsyncIterator[bytes], max_bytes: int) -> Intake:
        return Intake(chunks, max_bytes, self._settings.upload_stall_seconds)

    async def _require_room(self, owner_id: UUID, size: int) -> None:
        """Before a byte is taken; what counts is checked again when its size is known."""
        if size > self._settings.upload_max_bytes:
            raise TooLarge(_limit(self._settings))
        used = await self._db.read(repository.get_usage, owner_id)
        if not self._quota.allows(Usage(used.bytes + size, used.items + 1)):
            raise QuotaExceeded

    async def _put(self, key: str, intake: Intake, size: int | None) -> None:
        try:
            async with asyncio.timeout(self._settings.upload_seconds):
                await self._objects.put(key, intake, size=size, seconds=self._settings.upload_seconds)
        except TimeoutError:
            raise UploadTimeout from None

    async def _add(
        self,
        owner_id: UUID,
        intake: Intake,
        store: Callable[[str], Awaitable[str]],
        find: Find,
        keep: Keep,
        blob_id: UUID | None = None,
    ) -> Image:
        """Have `store` put the bytes under a key while `intake` reads them, and make an image of them.

        `store` answers the content type. Leaves no bytes behind that are not needed, whatever happens.
        """
        blob_id = blob_id or new_id()
        async with self._db.transaction() as tx:
            await repository.announce_blob(tx, blob_id, self._settings.upload_seconds + _GRACE_SECONDS)
        try:
            content_type = await store(models.original_key(blob_id))
            image = await self._register(owner_id, blob_id, content_type, intake, find, keep)
        except BaseException:
            # Also when the caller went away, which cancels this task. What cannot be done now the worker's sweep does.
            await asyncio.shield(self._sweeper.discard(blob_id))
            raise
        if image.blob_id != blob_id:
            await self._sweeper.discard(blob_id)  # the same bytes are there already
        return image

    async def _register(
        self, owner_id: UUID, blob_id: UUID, content_type: str, intake: Intake, find: Find, keep: Keep
    ) -> Image:
        sha256 = intake.sha256()
        async with self._db.transaction() as tx:
            if await forgetting.is_forgotten(tx, owner_id):
                raise Unauthenticated("the account is gone")
            if (earlier := await find(tx, sha256)) is not None:
                return earlier
            if not self._quota.allows(await repository.add_usage(tx, owner_id, intake.bytes)):
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
            await keep(tx, image)
        UPLOADED.inc(image.bytes)
        return image


async def _existing(connection: Connection, media_id: UUID) -> Image:
    """What an upload has become. Raises `NotFound` when that has been deleted."""
    image = (await repository.get_media(connection, [media_id])).get(media_id)
    if image is None:
        raise NotFound
    return image


def _limit(settings: Settings) -> str:
    return f"at most {settings.upload_max_bytes} bytes are taken"
