"""Parse, one call to the service, answer."""

from uuid import UUID

from aiohttp import web

from services.notifier import schemas, sse
from services.notifier.service import Inbox
from services.notifier.webhooks import Webhooks
from shared.application import NO_CONTENT, Call, Reply
from shared.clock import Clock
from shared.paging import Page, PageQuery, page


class Handlers:
    def __init__(self, inbox: Inbox, webhooks: Webhooks, clock: Clock, stream_write_seconds: float) -> None:
        self._inbox = inbox
        self._webhooks = webhooks
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

    async def get_preferences(self, call: Call) -> Reply[schemas.Preferences]:
        """Which email the caller wants"""
        return Reply(schemas.Preferences(await self._inbox.preferences(call.user_id)))

    async def put_preferences(self, call: Call, body: schemas.Preferences) -> Reply[schemas.Preferences]:
        """Say which email is wanted"""
        return Reply(schemas.Preferences(await self._inbox.set_preferences(call.user_id, body.email)))

    async def create_webhook(self, call: Call, body: schemas.NewWebhook) -> Reply[schemas.Webhook]:
        """Make a webhook; its secret is told this once"""
        webhook = await self._webhooks.create(call.user_id, body.url, body.events, call.once())
        return Reply(schemas.Webhook.of(webhook, webhook.secret))

    async def list_webhooks(self, call: Call, query: PageQuery) -> Reply[Page[schemas.Webhook]]:
        """List the own webhooks"""
        found = await self._webhooks.list(call.user_id, query)
        return Reply(page(found, query, schemas.Webhook.of, lambda webhook: webhook.id))

    async def delete_webhook(self, call: Call, webhook_id: UUID) -> Reply[None]:
        """Delete a webhook and its deliveries"""
        await self._webhooks.delete(call.user_id, webhook_id)
        return NO_CONTENT

    async def list_deliveries(self, call: Call, webhook_id: UUID, query: PageQuery) -> Reply[Page[schemas.Delivery]]:
        """List what was sent to a webhook"""
        found = await self._webhooks.deliveries(call.user_id, webhook_id, query)
        return Reply(page(found, query, schemas.Delivery.of, lambda delivery: delivery.id))

    async def redeliver(self, call: Call, webhook_id: UUID, delivery_id: UUID) -> Reply[None]:
        """Send a delivery once more"""
        await self._webhooks.redeliver(call.user_id, webhook_id, delivery_id)
        return NO_CONTENT
