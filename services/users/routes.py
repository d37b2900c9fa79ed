"""The URL table. Request and response types stand in the handlers' signatures."""

from services.users.handlers import Handlers
from shared.application import Access, Route


def routes(h: Handlers) -> list[Route]:
    return [
        Route("POST", "/api/v1/users", h.register, Access.PUBLIC, 201, idempotent=True),
        Route("GET", "/api/v1/users/me", h.get_own_account),
        Route("PATCH", "/api/v1/users/me", h.change_own_account),
        Route("GET", "/api/v1/users/{user_id}", h.get_profile, Access.PUBLIC),
        Route("POST", "/api/v1/sessions", h.log_in, Access.PUBLIC, 201),
        Route("POST", "/api/v1/sessions/refresh", h.refresh, Access.PUBLIC, 201),
        Route("GET", "/api/v1/sessions", h.list_sessions),
        Route("DELETE", "/api/v1/sessions", h.end_sessions),
        Route("DELETE", "/api/v1/sessions/current", h.end_current_session),
        Route("DELETE", "/api/v1/sessions/{session_id}", h.end_session),
        Route("GET", "/.well-known/jwks.json", h.get_key_set, Access.PUBLIC),
    ]
