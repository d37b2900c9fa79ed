"""Parse, one call to the service, answer."""

from uuid import UUID

from aiohttp import web

from services.notifier import schemas, sse
from services.notifier.service import Inbox
from shared.application import NO_CONTENT, Call, Reply
from shared.clock import Clock
from shared.paging import page


class Handlers:
    def __init__(self, inbox: Inbox, clock: Clock, stream_write_seconds: float) -> None:
        self._inbox = inbox
        self._clock = clock
        self._stream_write_seconds = stream_write_seconds

    async def list_notifications(self, call: Call, query: schemas.InboxQuery) -> Reply[schemas.NotificationPage]:
        """List the own notifications and count the unread ones"""
        found, unread = await self._inbox.notifications(call.user_id, query)
        shown = page(found, query, schemas.Notification.of, lambda notification: notification.id)
        return Reply(schemas.NotificationPage(shown.items, shown.next_cursor, unread))

    async def mark_read(self, call: Call, notification_id: UUID) -> Reply[None]:
        """Mark a notification as read"""
        await self._inbox.mark_read(call.user_id, notification_id)
        return NO_CONTENT

    async def mark_all_read(self, call: Call) -> Reply[None]:
        """Mark all notifications as read"""
        await self._inbox.mark_all_read(call.user_id)
        return NO_CONTENT

    async def stream(self, call: Call, query: schemas.StreamQuery) -> web.StreamResponse:
        """Follow what happens, live (server-sent events)

        Events `notification` and `media`. `Last-Event-ID` resumes where a connection was lost, for 24 hours; without
        it the stream starts from now. It ends when the access token does.
        """
        after = schemas.position_after(call.request.headers.get(sse.LAST_EVENT_ID), query)
        seconds = call.principal.expires_at - self._clock.now().timestamp()
        start = await self._inbox.stream_start(call.user_id, after)
        batches = self._inbox.follow(call.user_id, start, seconds)
        return await sse.respond(call.request, start, batches, self._stream_write_seconds)
