"""The URL table. Request and response types stand in the handlers' signatures."""

from services.users.handlers import Handlers
from shared.application import Access, Route


def routes(h: Handlers) -> list[Route]:
    return [
        Route("POST", "/api/v1/users", h.register, Access.PUBLIC, 201, idempotent=True, first=True),
        Route("GET", "/api/v1/users/me", h.get_own_account),
        Route("PATCH", "/api/v1/users/me", h.change_own_account),
        Route("DELETE", "/api/v1/users/me", h.delete_own_account, status=202),
        Route("PUT", "/api/v1/users/me/password", h.change_password, first=True),
        Route("GET", "/api/v1/users/me/security-events", h.list_security_events),
        Route("GET", "/api/v1/users/{user_id}", h.get_profile, Access.PUBLIC),
        Route("POST", "/api/v1/sessions", h.log_in, Access.PUBLIC, 201, first=True),
        Route("POST", "/api/v1/sessions/refresh", h.refresh, Access.PUBLIC, 201, first=True),
        Route("GET", "/api/v1/sessions", h.list_sessions),
        Route("DELETE", "/api/v1/sessions", h.end_sessions),
        Route("DELETE", "/api/v1/sessions/current", h.end_current_session),
        Route("DELETE", "/api/v1/sessions/{session_id}", h.end_session),
        Route("POST", "/api/v1/email-verifications", h.request_verification, status=202),
        Route("PUT", "/api/v1/email-verifications/{token}", h.verify_email, Access.PUBLIC),
        Route("POST", "/api/v1/password-resets", h.request_reset, Access.PUBLIC, 202),
        Route("PUT", "/api/v1/password-resets/{token}", h.reset_password, Access.PUBLIC, first=True),
        Route("GET", "/api/v1/admin/users", h.search_accounts, Access.ADMIN),
        Route("PATCH", "/api/v1/admin/users/{user_id}", h.change_account, Access.ADMIN),
        Route("GET", "/.well-known/jwks.json", h.get_key_set, Access.PUBLIC, first=True),
    ]
