"""The URL table. Request and response types stand in the handlers' signatures."""

from services.notifier.handlers import Handlers
from shared.application import Route


def routes(h: Handlers) -> list[Route]:
    return [
        Route("GET", "/api/v1/notifications", h.list_notifications),
        Route("GET", "/api/v1/notifications/stream", h.stream, streaming=True),
        Route("PUT", "/api/v1/notifications/read", h.mark_all_read),
        Route("PUT", "/api/v1/notifications/{notification_id}/read", h.mark_read),
    ]
