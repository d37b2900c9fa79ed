"""The URL table. Request and response types stand in the handlers' signatures."""

from services.notifier.handlers import Handlers
from shared.application import Access, Route


def routes(h: Handlers) -> list[Route]:
    return [
        Route("GET", "/api/v1/notifications", h.list_notifications),
        Route("GET", "/api/v1/notifications/stream", h.stream, streaming=True),
        Route("PUT", "/api/v1/notifications/read", h.mark_all_read),
        Route("PUT", "/api/v1/notifications/{notification_id}/read", h.mark_read),
        Route("GET", "/api/v1/notification-preferences", h.get_preferences),
        Route("PUT", "/api/v1/notification-preferences", h.put_preferences),
        Route("POST", "/api/v1/webhooks", h.create_webhook, status=201, idempotent=True),
        Route("GET", "/api/v1/webhooks", h.list_webhooks),
        Route("DELETE", "/api/v1/webhooks/{webhook_id}", h.delete_webhook),
        Route("GET", "/api/v1/webhooks/{webhook_id}/deliveries", h.list_deliveries),
        Route("POST", "/api/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver", h.redeliver, status=202),
        Route("POST", "/api/v1/campaigns", h.create_campaign, Access.ADMIN, 202, idempotent=True),
        Route("GET", "/api/v1/campaigns", h.list_campaigns, Access.ADMIN),
        Route("GET", "/api/v1/campaigns/{campaign_id}", h.get_campaign, Access.ADMIN),
        Route("POST", "/api/v1/campaigns/{campaign_id}/pause", h.pause_campaign, Access.ADMIN),
        Route("POST", "/api/v1/campaigns/{campaign_id}/resume", h.resume_campaign, Access.ADMIN),
        Route("POST", "/api/v1/campaigns/{campaign_id}/cancel", h.cancel_campaign, Access.ADMIN),
        Route("GET", "/api/v1/unsubscribe/{token}", h.show_unsubscribe, Access.PUBLIC),
        Route("POST", "/api/v1/unsubscribe/{token}", h.unsubscribe, Access.PUBLIC),
    ]
