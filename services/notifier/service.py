"""The use cases of notifier: the inbox of a user, and telling people what happened. Each owns its transaction."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Any
from uuid import UUID

import msgspec

from services.notifier import campaign_repository, email_repository, repository, schemas
from services.notifier.consumed import (
    MediaFailed,
    MediaProcessed,
    UserDeleted,
    UserPasswordChanged,
    UserPasswordResetRequested,
    UserRegistered,
    UserUpdated,
    UserVerificationRequested,
)
from services.notifier.errors import UnknownCategory
from services.notifier.models import OPTIONAL, Category, Notification, StreamEntry, WebhookEvent, without_links
from services.notifier.streams import Hub, Watch
from services.notifier.texts import Texts
from services.notifier.wakes import Wakes
from shared import forgetting
from shared.consumer import AlreadyHandled, Delivery
from shared.database import Database, Transaction
from shared.errors import NotFound, Unauthenticated, Unavailable
from shared.group_commit import GroupCommit
from shared.ids import new_id

# In the transaction of the event's effect: event id, owner, what happened, and the data.
QueueWebhooks = Callable[[Transaction, UUID, UUID, WebhookEvent, dict[str, Any]], Awaitable[None]]

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

    async def preferences(self, user_id: UUID) -> dict[str, bool]:
        """Whether each category of email is wanted."""
        refused = await self._db.read(repository.get_refused_email, user_id)
        return {category.value: category not in refused for category in sorted(OPTIONAL)}

    async def set_preferences(self, user_id: UUID, wanted: Mapping[str, bool]) -> dict[str, bool]:
        """Raises `UnknownCategory`."""
        if unknown := sorted(set(wanted) - OPTIONAL):
            raise UnknownCategory(unknown)
        async with self._db.transaction() as tx:
            if await forgetting.is_forgotten(tx, user_id):
                raise Unauthenticated("the account is gone")
            await repository.ensure_recipient(tx, user_id)
            await repository.set_refused_email(tx, user_id, [name for name, wants in wanted.items() if not wants])
        return {category.value: wanted.get(category, True) for category in sorted(OPTIONAL)}

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

    def __init__(
        self,
        texts: Texts,
        wakes: Wakes,
        wake_sender: Callable[[], None],
        message_domain: str,
        queue_webhooks: QueueWebhooks,
    ) -> None:
        self._texts = texts
        self._wakes = wakes
        self._wake_sender = wake_sender
        self._message_domain = message_domain
        self._queue_webhooks = queue_webhooks

    async def welcome(self, delivery: Delivery[UserRegistered]) -> None:
        event = delivery.event
        async with self._about(delivery, event.user_id) as tx:
            await self._keep(tx, event)
            link = msgspec.to_builtins(event.link) if event.link else {}
            await self._tell(tx, delivery.envelope.id, event.user_id, Category.WELCOME, {}, in_email=link)

    async def keep_recipient(self, delivery: Delivery[UserUpdated]) -> None:
        async with self._about(delivery, delivery.event.user_id) as tx:
            await self._keep(tx, delivery.event)
            tx.after_commit(self._wake_sender)  # what has waited for an address

    async def send_verification(self, delivery: Delivery[UserVerificationRequested]) -> None:
        await self._send_link(delivery, Category.VERIFY_EMAIL)

    async def send_password_reset(self, delivery: Delivery[UserPasswordResetRequested]) -> None:
        await self._send_link(delivery, Category.RESET_PASSWORD)

    async def tell_password_changed(self, delivery: Delivery[UserPasswordChanged]) -> None:
        user_id = delivery.event.user_id
        async with self._about(delivery, user_id) as tx:
            await self._tell(tx, delivery.envelope.id, user_id, Category.PASSWORD_CHANGED, {})

    async def forget(self, delivery: Delivery[UserDeleted]) -> None:
        """The inbox, the stream, all email, sent or not, the address, and what campaigns say of the user. What comes
        later is passed over."""
        async with delivery.transaction() as tx:
            await forgetting.forget(tx, delivery.event.user_id)
            await campaign_repository.forget_user(tx, delivery.event.user_id)
            await repository.delete_recipient(tx, delivery.event.user_id)

    async def tell_media_ready(self, delivery: Delivery[MediaProcessed]) -> None:
        event = delivery.event
        change = schemas.MediaChange(event.media_id, "ready", event.title)
        async with self._about(delivery, event.owner_id) as tx:
            await self._tell(tx, delivery.envelope.id, event.owner_id, Category.MEDIA_READY, _data(change), change)
            told = msgspec.to_builtins(change)
            await self._queue_webhooks(tx, delivery.envelope.id, event.owner_id, WebhookEvent.MEDIA_PROCESSED, told)

    async def tell_media_failed(self, delivery: Delivery[MediaFailed]) -> None:
        event = delivery.event
        change = schemas.MediaChange(event.media_id, "failed", event.title, event.reason)
        async with self._about(delivery, event.owner_id) as tx:
            await self._tell(tx, delivery.envelope.id, event.owner_id, Category.MEDIA_FAILED, _data(change), change)
            told = msgspec.to_builtins(change)
            await self._queue_webhooks(tx, delivery.envelope.id, event.owner_id, WebhookEvent.MEDIA_FAILED, told)

    @asynccontextmanager
    async def _about(self, delivery: Delivery[Any], user_id: UUID) -> AsyncIterator[Transaction]:
        """The transaction of an effect for this user. Ends the handler for one who is gone: topics know no order."""
        async with delivery.transaction() as tx:
            if await forgetting.is_forgotten(tx, user_id):
                raise AlreadyHandled
            yield tx

    async def tell_webhook_disabled(self, tx: Transaction, event_id: UUID, user_id: UUID, url: str) -> None:
        """In the transaction that disables it."""
        await self._tell(tx, event_id, user_id, Category.WEBHOOK_DISABLED, {"url": url})

    async def _send_link(
        self, delivery: Delivery[UserVerificationRequested] | Delivery[UserPasswordResetRequested], category: Category
    ) -> None:
        """By email only: what it opens must not lie in an inbox that a stolen session can read."""
        event = delivery.event
        async with self._about(delivery, event.user_id) as tx:
            await repository.require_recipient(tx, event.user_id)
            await self._mail(tx, delivery.envelope.id, event.user_id, category, msgspec.to_builtins(event.link))

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
        *,
        in_email: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """In the inbox, on the stream and by email; only the email knows of `in_email`."""
        recipient = await repository.advance_stream(tx, user_id, by=1 if change is None else 2)
        title, body = self._texts.notice(
            category, recipient.locale, data | {"display_name": without_links(recipient.display_name)}
        )
        notification = await repository.insert_notification(tx, new_id(), user_id, category, title, body, data)
        newest = recipient.stream_position
        entries = [_entry(newest, "notification", schemas.Notification.of(notification))]
        if change is not None:
            entries.insert(0, _entry(newest - 1, "media", change))
        await repository.insert_stream_entries(tx, user_id, entries)
        tx.after_commit(partial(self._wakes.announce, user_id, newest))
        if category not in OPTIONAL or category not in await repository.get_refused_email(tx, user_id):
            await self._mail(tx, event_id, user_id, category, {**data, **in_email})

    async def _mail(
        self, tx: Transaction, event_id: UUID, user_id: UUID, category: Category, context: Mapping[str, Any]
    ) -> None:
        email_id = new_id()
        message_id = f"<{email_id}@{self._message_domain}>"
        await email_repository.insert_email(tx, email_id, event_id, user_id, category, context, message_id)
        tx.after_commit(self._wake_sender)


def _data(change: schemas.MediaChange) -> dict[str, Any]:
    """The notification's data, and what its texts are made from."""
    data: dict[str, Any] = msgspec.to_builtins(change)
    return {name: value for name, value in data.items() if name != "status" and value is not None}


def _entry(position: int, event: str, data: object) -> StreamEntry:
    return StreamEntry(position, event, msgspec.json.encode(data).decode())
