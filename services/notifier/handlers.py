"""Parse, one call to the service, answer."""

from uuid import UUID

from aiohttp import web

from services.notifier import schemas, sse
from services.notifier.campaigns import Campaigns
from services.notifier.service import Inbox
from services.notifier.texts import Texts
from services.notifier.webhooks import Webhooks
from shared.application import NO_CONTENT, Call, Reply
from shared.clock import Clock
from shared.paging import Page, PageQuery, page


class Handlers:
    def __init__(
        self,
        inbox: Inbox,
        webhooks: Webhooks,
        campaigns: Campaigns,
        texts: Texts,
        clock: Clock,
        stream_write_seconds: float,
    ) -> None:
        self._inbox = inbox
        self._webhooks = webhooks
        self._campaigns = campaigns
        self._texts = texts
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

    async def create_campaign(self, call: Call, body: schemas.NewCampaign) -> Reply[schemas.Campaign]:
        """Send one text to many users"""
        campaign = await self._campaigns.create(call.user_id, body.model(), call.once())
        location = {"Location": f"/api/v1/campaigns/{campaign.campaign.id}"}
        return Reply(schemas.Campaign.of(campaign), headers=location)

    async def list_campaigns(self, call: Call, query: PageQuery) -> Reply[Page[schemas.Campaign]]:
        """List campaigns and how far they are"""
        found = await self._campaigns.list(query)
        return Reply(page(found, query, schemas.Campaign.of, lambda progress: progress.campaign.id))

    async def get_campaign(self, call: Call, campaign_id: UUID) -> Reply[schemas.Campaign]:
        """A campaign and how far it is"""
        return Reply(schemas.Campaign.of(await self._campaigns.get(campaign_id)))

    async def pause_campaign(self, call: Call, campaign_id: UUID) -> Reply[schemas.Campaign]:
        """Send no more of it for now"""
        return Reply(schemas.Campaign.of(await self._campaigns.pause(campaign_id)))

    async def resume_campaign(self, call: Call, campaign_id: UUID) -> Reply[schemas.Campaign]:
        """Go on sending it"""
        return Reply(schemas.Campaign.of(await self._campaigns.resume(campaign_id)))

    async def cancel_campaign(self, call: Call, campaign_id: UUID) -> Reply[schemas.Campaign]:
        """Send no more of it, for good"""
        return Reply(schemas.Campaign.of(await self._campaigns.cancel(campaign_id)))

    async def show_unsubscribe(self, call: Call, token: UUID) -> web.StreamResponse:
        """A page with a button: opening a link must not change anything"""
        await self._campaigns.check_token(token)
        return self._page(call, done=False)

    async def unsubscribe(self, call: Call, token: UUID) -> web.StreamResponse:
        """Get no more campaigns, by one click (RFC 8058)"""
        await self._campaigns.unsubscribe(token)
        return self._page(call, done=True)

    def _page(self, call: Call, *, done: bool) -> web.Response:
        language = call.request.headers.get("Accept-Language", "")[:2].lower()
        html = self._texts.page("unsubscribe", language, {"done": done})
        policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
        return web.Response(text=html, content_type="text/html", headers={"Content-Security-Policy": policy})
