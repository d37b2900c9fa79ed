"""The use cases of notifier: the inbox of a user, and telling people what happened. Each owns its transaction."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

import msgspec

from services.notifier import repository, schemas
from services.notifier.consumed import MediaFailed, MediaProcessed, UserRegistered, UserUpdated
from services.notifier.models import Category, Notification, StreamEntry, greeting_name
from services.notifier.streams import Hub, Watch
from services.notifier.texts import Texts
from services.notifier.wakes import Wakes
from shared.consumer import Delivery
from shared.database import Database, Transaction
from shared.errors import NotFound, Unavailable
from shared.group_commit import GroupCommit
from shared.ids import new_id

_BATCH = 100
_RETRY_SECONDS = 1.0


class Inbox:
    """What a user sees: notifications, and the stream of what happens."""

    def __init__(self, db: Database, hub: Hub, heartbeat_seconds: float) -> None:
        self._db = db
        self._marks = GroupCommit(db, repository.mark_read, key=lambda mark: mark[1])
        self._hub = hub
        self._heartbeat_seconds = heartbeat_seconds

    async def notifications(self, user_id: UUID, query: schemas.InboxQuery) -> tuple[Sequence[Notification], int]:
        """A page (and one more, if there is), and the number of all unread ones."""
        return await self._db.read(repository.get_inbox, user_id, query.unread, query.before(), query.limit + 1)

    async def mark_read(self, user_id: UUID, notification_id: UUID) -> None:
        if not await self._marks.write((user_id, notification_id)):
            raise NotFound

    async def mark_all_read(self, user_id: UUID) -> None:
        async with self._db.transaction() as tx:
            await repository.mark_all_read(tx, user_id)

    async def stream_start(self, user_id: UUID, after: int | None) -> int:
        """The position a stream starts at: now, or `after`, which cannot lie in the future."""
        async with self._db.transaction() as tx:
            newest = await repository.get_stream_position(tx, user_id)
        return newest if after is None else min(after, newest)

    async def follow(self, user_id: UUID, start: int, seconds: float) -> AsyncGenerator[Sequence[StreamEntry]]:
        """What comes after `start`, in order and without gaps, as it comes; an empty batch at once and for each
        heartbeat. Ends after so many seconds, or when the process stops. Raises `TooManyStreams`."""
        until = time.monotonic() + seconds
        with self._hub.watch(user_id, start) as watch:
            yield ()
            while not watch.closed and (left := until - time.monotonic()) > 0:
                if not await watch.wait(min(left, self._heartbeat_seconds)):
                    yield ()
                elif not watch.closed and (batch := await self._next(user_id, watch)):
                    yield batch

    async def _next(self, user_id: UUID, watch: Watch) -> Sequence[StreamEntry]:
        """The entries after the watch's position, which moves on. From the primary: what a wake tells of may not have
        come to a replica yet."""
        try:
            async with self._db.transaction() as tx:
                newest = await repository.get_stream_position(tx, user_id)
                entries = await repository.list_stream_entries(tx, user_id, watch.position, _BATCH)
        except Unavailable:
            await asyncio.sleep(_RETRY_SECONDS)  # the reader need not know
            watch.look_again()
            return ()
        if entries:
            watch.position = entries[-1].position
        else:
            # Asked before the entries were, so whatever there was up to here is deleted by now.
            watch.position = max(watch.position, newest)
        if len(entries) == _BATCH:
            watch.look_again()
        return entries


class Notifier:
    """What events lead to: a notification, entries of the stream and an email, together and once an event."""

    def __init__(self, texts: Texts, wakes: Wakes, wake_sender: Callable[[], None], message_domain: str) -> None:
        self._texts = texts
        self._wakes = wakes
        self._wake_sender = wake_sender
        self._message_domain = message_domain

    async def welcome(self, delivery: Delivery[UserRegistered]) -> None:
        async with delivery.transaction() as tx:
            await self._keep(tx, delivery.event)
            await self._tell(tx, delivery.envelope.id, delivery.event.user_id, Category.WELCOME, {})

    async def keep_recipient(self, delivery: Delivery[UserUpdated]) -> None:
        async with delivery.transaction() as tx:
            await self._keep(tx, delivery.event)
            tx.after_commit(self._wake_sender)  # what has waited for an address

    async def tell_media_ready(self, delivery: Delivery[MediaProcessed]) -> None:
        event = delivery.event
        change = schemas.MediaChange(event.media_id, "ready", event.title)
        async with delivery.transaction() as tx:
            await self._tell(tx, delivery.envelope.id, event.owner_id, Category.MEDIA_READY, _about(change), change)

    async def tell_media_failed(self, delivery: Delivery[MediaFailed]) -> None:
        event = delivery.event
        change = schemas.MediaChange(event.media_id, "failed", event.title, event.reason)
        async with delivery.transaction() as tx:
            await self._tell(tx, delivery.envelope.id, event.owner_id, Category.MEDIA_FAILED, _about(change), change)

    @staticmethod
    async def _keep(tx: Transaction, event: UserRegistered | UserUpdated) -> None:
        await repository.upsert_recipient(
            tx, event.user_id, event.email, event.display_name, event.locale, event.version
        )

    async def _tell(
        self,
        tx: Transaction,
        event_id: UUID,
        user_id: UUID,
        category: Category,
        data: dict[str, Any],
        change: schemas.MediaChange | None = None,
    ) -> None:
        recipient = await repository.advance_stream(tx, user_id, by=1 if change is None else 2)
        title, body = self._texts.notice(
            category, recipient.locale, data | {"display_name": greeting_name(recipient.display_name)}
        )
        notification = await repository.insert_notification(tx, new_id(), user_id, category, title, body, data)
        newest = recipient.stream_position
        entries = [_entry(newest, "notification", schemas.Notification.of(notification))]
        if change is not None:
            entries.insert(0, _entry(newest - 1, "media", change))
        await repository.insert_stream_entries(tx, user_id, entries)
        email_id = new_id()
        message_id = f"<{email_id}@{self._message_domain}>"
        await repository.insert_email(tx, email_id, event_id, user_id, category, data, message_id)
        tx.after_commit(partial(self._wakes.announce, user_id, newest))
        tx.after_commit(self._wake_sender)


def _about(change: schemas.MediaChange) -> dict[str, Any]:
    """The notification's data, and what its texts are made from."""
    data: dict[str, Any] = msgspec.to_builtins(change)
    return {name: value for name, value in data.items() if name != "status" and value is not None}


def _entry(position: int, event: str, data: object) -> StreamEntry:
    return StreamEntry(position, event, msgspec.json.encode(data).decode())
