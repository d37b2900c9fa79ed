"""Bytes on their way into the object store, and out of it when nobody uses them any more."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import datetime
from uuid import UUID

import asyncpg

from services.media import models, repository
from services.media.content_types import SNIFFED_BYTES, sniff
from services.media.errors import EmptyUpload, NotAnImage, UploadTimeout
from shared.database import Database
from shared.errors import TenfoldError, TooLarge
from shared.logs import get_logger
from shared.objects import Objects

log = get_logger()

_BATCH = 25


class Intake:
    """An upload as it comes: hashed, counted, limited. Iterate it once, after `sniff`."""

    def __init__(self, chunks: AsyncIterator[bytes], max_bytes: int, stall_seconds: float) -> None:
        self._chunks = chunks
        self._max_bytes = max_bytes
        self._stall_seconds = stall_seconds
        self._head = b""
        self._hash = hashlib.sha256()
        self.bytes = 0

    async def sniff(self) -> str:
        """The content type, from the first bytes. Raises `EmptyUpload` or `NotAnImage`."""
        while len(self._head) < SNIFFED_BYTES and (chunk := await self._next()):
            self._head += chunk
        if not self._head:
            raise EmptyUpload
        content_type = sniff(self._head)
        if content_type is None:
            raise NotAnImage
        return content_type

    def sha256(self) -> str:
        """Of what has been iterated over."""
        return self._hash.hexdigest()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunk, self._head = self._head or await self._next(), b""
        if not chunk:
            raise StopAsyncIteration
        self.bytes += len(chunk)
        if self.bytes > self._max_bytes:
            raise TooLarge(f"at most {self._max_bytes} bytes are taken")
        self._hash.update(chunk)
        return chunk

    async def _next(self) -> bytes:
        """The next chunk; nothing at the end."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                return await anext(self._chunks, b"")
        except TimeoutError:
            raise UploadTimeout(f"nothing came for {self._stall_seconds:g} s") from None


class Sweeper:
    """Deletes the objects of blobs that are not used, and of uploads that nobody can be sending any more.

    Everything is repeatable; any number may sweep at once.
    """

    def __init__(self, db: Database, objects: Objects) -> None:
        self._db = db
        self._objects = objects
        self._woken = asyncio.Event()

    async def discard(self, blob_id: UUID) -> None:
        """Delete a blob's objects now unless it is in use. Does not raise: a later sweep makes up for it."""
        try:
            async with self._db.transaction() as tx:
                doomed_at = await repository.doom_blob(tx, blob_id)
            if doomed_at is not None:
                await self._delete_blobs([(blob_id, doomed_at)])
        except (TenfoldError, OSError, asyncpg.PostgresError) as error:
            log.warning("blob_not_discarded", error=repr(error))

    def wake(self) -> None:
        """Have what is doomed deleted soon; who calls does not wait for it."""
        self._woken.set()

    async def keep_sweeping(self, seconds: float) -> None:
        """Sweep every so many seconds and when woken, for ever."""
        while True:
            self._woken.clear()
            try:
                if swept := await self._sweep_uploads() + await self._sweep_blobs():
                    log.info("store_swept", swept=swept)
            except (TenfoldError, OSError, asyncpg.PostgresError) as error:
                log.warning("sweep_failed", error=repr(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._woken.wait()

    async def _sweep_uploads(self) -> int:
        swept = 0
        while True:
            doomed = await self._db.read(repository.get_doomed_uploads, _BATCH)
            if doomed:
                await self._objects.delete(*(models.incoming_key(upload_id) for upload_id in doomed))
                async with self._db.transaction() as tx:
                    await repository.forget_uploads(tx, doomed)
            swept += len(doomed)
            if len(doomed) < _BATCH:
                return swept

    async def _sweep_blobs(self) -> int:
        swept = 0
        while True:
            async with self._db.transaction() as tx:  # on the primary: an older state could doom what is in use by now
                doomed = await repository.get_doomed_blobs(tx, _BATCH)
            if doomed:
                await self._delete_blobs(doomed)
            swept += len(doomed)
            if len(doomed) < _BATCH:
                return swept

    async def _delete_blobs(self, doomed: Sequence[tuple[UUID, datetime]]) -> None:
        """The row goes after the objects, unless it was doomed anew meanwhile: then somebody may have written again."""
        await self._objects.delete(*(key for blob_id, _ in doomed for key in models.all_keys(blob_id)))
        async with self._db.transaction() as tx:
            await repository.forget_blobs(tx, doomed)
