"""Every endpoint of the platform, and how it must refuse. `tests/contract/test_routes.py` holds it against the routes.

401: without a token or with a bad one. 403: without the role. 404: what is not there or somebody else's. 412: a stale
`If-Match`. 422: a field that is not known, or a body that is missing.
"""

from dataclasses import dataclass, field
from typing import Any

NOBODY = "00000000-0000-7000-8000-000000000000"


@dataclass(frozen=True)
class Endpoint:
    """`body` is a valid one. `public`: what its path names everybody may see, so that only what is absent is 404."""

    refuses: frozenset[int]
    body: Any = None
    public: bool = field(default=False, kw_only=True)


def _(*refuses: int, body: Any = None, public: bool = False) -> Endpoint:
    return Endpoint(frozenset(refuses), body, public=public)


_ANN = {"email": "ann@example.org", "password": "correct horse battery", "display_name": "Ann"}
_CAMPAIGN = {"name": "x", "subject": "x", "text": "x", "audience": {"all": True}}

ENDPOINTS: dict[str, Endpoint] = {
    "GET /api/v1": _(),
    "GET /api/v1/home": _(401),
    "GET /api/openapi.json": _(),
    # users
    "POST /api/v1/users": _(422, body=_ANN),
    "GET /api/v1/users/me": _(401),
    "PATCH /api/v1/users/me": _(401, 412, 422, body={"bio": "x"}),
    "DELETE /api/v1/users/me": _(401, 412),
    "PUT /api/v1/users/me/password": _(401, 422, body={"current_password": "x", "new_password": "long enough"}),
    "GET /api/v1/users/me/security-events": _(401, 422),
    "GET /api/v1/users/{user_id}": _(404, public=True),
    "POST /api/v1/sessions": _(422, body={"email": "nobody@example.org", "password": "x"}),
    "POST /api/v1/sessions/refresh": _(422, body={"refresh_token": "x"}),
    "GET /api/v1/sessions": _(401, 422),
    "DELETE /api/v1/sessions": _(401),
    "DELETE /api/v1/sessions/current": _(401),
    "DELETE /api/v1/sessions/{session_id}": _(401, 404),
    "POST /api/v1/email-verifications": _(401),
    "PUT /api/v1/email-verifications/{token}": _(404, public=True),
    "POST /api/v1/password-resets": _(422, body={"email": "nobody@example.org"}),
    "PUT /api/v1/password-resets/{token}": _(404, 422, body={"new_password": "long enough"}, public=True),
    "GET /api/v1/admin/users": _(401, 403, 422),
    "PATCH /api/v1/admin/users/{user_id}": _(401, 403, 404, 412, 422, body={"disabled": True}),
    "GET /.well-known/jwks.json": _(),
    # media
    "POST /api/v1/media": _(401, 422),
    "POST /api/v1/media/uploads": _(401, 422, body={"content_type": "image/png", "bytes": 9}),
    "PUT /api/v1/media/uploads/{upload_id}": _(404, 422),
    "POST /api/v1/media/uploads/{upload_id}/complete": _(401, 404),
    "GET /api/v1/media": _(401, 422),
    "GET /api/v1/media/usage": _(401),
    "GET /api/v1/media/{media_id}": _(401, 404),
    "PATCH /api/v1/media/{media_id}": _(401, 404, 412, 422, body={"title": "x"}),
    "DELETE /api/v1/media/{media_id}": _(401, 404, 412),
    "GET /api/v1/media/{media_id}/original": _(404, 422),
    "HEAD /api/v1/media/{media_id}/original": _(404, 422),
    "GET /api/v1/media/{media_id}/variants/{name}": _(404, 422),
    "HEAD /api/v1/media/{media_id}/variants/{name}": _(404, 422),
    # notifier
    "GET /api/v1/notifications": _(401, 422),
    "GET /api/v1/notifications/stream": _(401, 422),
    "PUT /api/v1/notifications/read": _(401),
    "PUT /api/v1/notifications/{notification_id}/read": _(401, 404),
    "GET /api/v1/notification-preferences": _(401),
    "PUT /api/v1/notification-preferences": _(401, 422, body={"email": {}}),
    "POST /api/v1/webhooks": _(401, 422, body={"url": "https://example.org/", "events": ["media.processed"]}),
    "GET /api/v1/webhooks": _(401, 422),
    "DELETE /api/v1/webhooks/{webhook_id}": _(401, 404),
    "GET /api/v1/webhooks/{webhook_id}/deliveries": _(401, 404, 422),
    "POST /api/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver": _(401, 404),
    "POST /api/v1/campaigns": _(401, 403, 422, body=_CAMPAIGN),
    "GET /api/v1/campaigns": _(401, 403, 422),
    "GET /api/v1/campaigns/{campaign_id}": _(401, 403, 404, public=True),
    "POST /api/v1/campaigns/{campaign_id}/pause": _(401, 403, 404, public=True),
    "POST /api/v1/campaigns/{campaign_id}/resume": _(401, 403, 404, public=True),
    "POST /api/v1/campaigns/{campaign_id}/cancel": _(401, 403, 404, public=True),
    "GET /api/v1/unsubscribe/{token}": _(404, public=True),
    "POST /api/v1/unsubscribe/{token}": _(404, public=True),
}
