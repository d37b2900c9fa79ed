"""The use cases of the worker: make variants of what was uploaded, delete what nobody uses.

Everything may happen twice and be cut off anywhere: objects are overwritten by equal ones, the row and the events
change in the transaction that notes the event as handled, and what the store may hold is known from `blobs`.
"""

import asyncio
import shutil
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from services.media import models, repository
from services.media.blobs import Sweeper
from services.media.children import CannotProcess, Children
from services.media.consumed import MediaDeleted, MediaUploaded, UserDeleted
from services.media.events import MediaFailed, MediaProcessed, VariantMade
from services.media.fairness import FairGate
from services.media.models import Image, Processed
from shared import forgetting, metrics, tracing
from shared.consumer import Delivery
from shared.database import Database
from shared.logs import get_logger
from shared.objects import Objects
from shared.outbox import Outbox

log = get_logger()

_PREFIX = "tenfold-media-"
_ABANDONED_SECONDS = 3600.0

DURATION = metrics.Histogram(
    "tenfold_media_processing_seconds", "Time to process an image", ("outcome",), buckets=metrics.DURATION_BUCKETS
)


class Processing:
    def __init__(
        self, db: Database, outbox: Outbox, objects: Objects, children: Children, sweeper: Sweeper, processes: int
    ) -> None:
        self._db = db
        self._outbox = outbox
        self._objects = objects
        self._children = children
        self._sweeper = sweeper
        # At work at a time: what is in processing, and the next original, which is being fetched.
        self._gate = FairGate(processes + 1)

    async def process(self, delivery: Delivery[MediaUploaded]) -> None:
        """Make the variants, or say why that cannot be, when it is the owner's turn."""
        async with AsyncExitStack() as stack:
            with delivery.waiting():
                await stack.enter_async_context(self._gate.turn(delivery.event.owner_id))
            await self._process(delivery)

    async def _process(self, delivery: Delivery[MediaUploaded]) -> None:
        """Leaves nothing behind when the media are gone meanwhile."""
        await delivery.stop_if_handled()
        event = delivery.event
        result: Processed | CannotProcess | None = None
        async with self._db.transaction() as tx:  # on the primary: a replica may not have it yet
            wanted = await repository.get_media(tx, [event.media_id])
        if wanted:
            result = await self._result(event)
        async with delivery.transaction() as tx:
            image = await repository.get_media_for_update(tx, event.media_id)
            if image is None or result is None:
                # Deleted. An earlier attempt or this one may have stored variants after the blob was swept.
                await repository.doom_blob(tx, event.blob_id)
            elif isinstance(result, Processed):
                await repository.mark_ready(tx, image.id, result)
                await self._outbox.add(tx, _processed(image, result))
            else:
                await repository.mark_failed(tx, image.id, result.reason)
                await self._outbox.add(tx, _failed(image, result))
        if image is None:
            await self._sweeper.discard(event.blob_id)

    async def forget(self, _delivery: Delivery[MediaDeleted]) -> None:
        """Delete the bytes, now that the deletion is committed."""
        self._sweeper.wake()

    async def forget_owner(self, delivery: Delivery[UserDeleted]) -> None:
        """Everything the user had, and the bytes that nobody else has."""
        async with delivery.transaction() as tx:
            await forgetting.forget(tx, delivery.event.user_id)
            await repository.delete_all_of(tx, delivery.event.user_id)
        self._sweeper.wake()

    async def _result(self, event: MediaUploaded) -> Processed | CannotProcess:
        started = time.perf_counter()
        outcome = "interrupted"
        try:
            with tracing.span("process image", content_type=event.content_type, bytes=event.bytes):
                result = await self._of_twin(event) or await self._of_original(event)
        except CannotProcess as error:
            outcome = error.code
            log.info("media_failed", media_id=str(event.media_id), code=error.code)
            return error
        else:
            outcome = "ready"
            return result
        finally:
            metrics.child(DURATION, outcome).observe(time.perf_counter() - started)

    async def _of_twin(self, event: MediaUploaded) -> Processed | None:
        """The result for identical bytes that were processed before."""
        twin = await self._db.read(repository.get_twin_that_is_ready, event.blob_id)
        if twin is None or twin.width is None or twin.height is None or twin.placeholder is None:
            return None
        return Processed(twin.width, twin.height, twin.placeholder, twin.variants, twin.shown)

    async def _of_original(self, event: MediaUploaded) -> Processed:
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
            source, target = Path(folder, "original"), Path(folder)
            await self._fetch(event, source)
            processed = await self._children.process(source, target, event.content_type)
            for variant in processed.variants:
                data = await asyncio.to_thread(Path(target, f"{variant.name}.webp").read_bytes)
                key = models.variant_key(event.blob_id, variant.name)
                await self._objects.put(key, data, content_type=models.VARIANT_TYPE)
        return processed

    async def _fetch(self, event: MediaUploaded, target: Path) -> None:
        key = models.original_key(event.blob_id)
        stored = await self._objects.head(key)
        if stored is None or stored.bytes != event.bytes:  # what is cut off the store would refuse to read, for ever
            raise CannotProcess("lost", "the original is not there any more, or not whole")
        with target.open("wb") as file:
            try:
                async for piece in self._objects.stream(key, 0, event.bytes):
                    await asyncio.to_thread(file.write, piece)
            except FileNotFoundError:
                raise CannotProcess("lost", "the original is not there any more") from None


def clear_scratch() -> None:
    """Delete what workers that were killed left in the temporary directory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder)


def _processed(image: Image, processed: Processed) -> MediaProcessed:
    return MediaProcessed(
        media_id=image.id,
        owner_id=image.owner_id,
        title=image.title,
        width=processed.width,
        height=processed.height,
        variants=tuple(
            VariantMade(v.name, models.VARIANT_TYPE, v.width, v.height, v.bytes) for v in processed.variants
        ),
    )


def _failed(image: Image, why: CannotProcess) -> MediaFailed:
    return MediaFailed(media_id=image.id, owner_id=image.owner_id, title=image.title, code=why.code, reason=why.reason)
