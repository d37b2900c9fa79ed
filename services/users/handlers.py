"""Parse, one call to the service, answer."""

import base64
from uuid import UUID

from services.users import schemas
from services.users.keys import SigningKeys
from services.users.models import Client
from services.users.service.accounts import Accounts
from services.users.service.administration import Administration
from services.users.service.credentials import Credentials
from services.users.service.sessions import Sessions
from shared.application import NO_CONTENT, Call, Reply
from shared.paging import Page, PageQuery, page

_DEVICE_LENGTH = 200


class Handlers:
    def __init__(
        self,
        accounts: Accounts,
        sessions: Sessions,
        credentials: Credentials,
        administration: Administration,
        keys: SigningKeys,
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._credentials = credentials
        self._administration = administration
        self._keys = keys

    async def register(self, call: Call, body: schemas.Register) -> Reply[schemas.User]:
        """Make an account"""
        # Without the password: a fast hash of it must not lie in the database. The service verifies it.
        once = call.once(f"{body.email}\n{body.display_name}".encode())
        account = await self._accounts.register(body.email, body.password, body.display_name, _client(call), once)
        return Reply(schemas.User.of(account), account.version, {"Location": f"/api/v1/users/{account.id}"})

    async def log_in(self, call: Call, body: schemas.LogIn) -> Reply[schemas.SessionTokens]:
        """Open a session"""
        tokens = await self._sessions.log_in(body.email, body.password, _client(call))
        return Reply(schemas.SessionTokens.of(tokens))

    async def refresh(self, call: Call, body: schemas.Refresh) -> Reply[schemas.SessionTokens]:
        """Spend a refresh token for new tokens"""
        tokens = await self._sessions.refresh(body.refresh_token, _client(call))
        return Reply(schemas.SessionTokens.of(tokens))

    async def list_sessions(self, call: Call, query: PageQuery) -> Reply[Page[schemas.SessionEntry]]:
        """List the own sessions"""
        current = call.principal.session_id
        found = await self._sessions.list(call.user_id, query)
        return Reply(page(found, query, lambda s: schemas.SessionEntry.of(s, current), lambda s: s.id))

    async def end_current_session(self, call: Call) -> Reply[None]:
        """Log out"""
        await self._sessions.end(call.user_id, call.principal.session_id, _client(call))
        return NO_CONTENT

    async def end_session(self, call: Call, session_id: UUID) -> Reply[None]:
        """Log one session out"""
        await self._sessions.end(call.user_id, session_id, _client(call))
        return NO_CONTENT

    async def end_sessions(self, call: Call) -> Reply[None]:
        """Log all sessions out"""
        await self._sessions.end_all(call.user_id, _client(call))
        return NO_CONTENT

    async def get_own_account(self, call: Call) -> Reply[schemas.User]:
        """The own account"""
        account = await self._accounts.account(call.user_id)
        return Reply(schemas.User.of(account), account.version)

    async def change_own_account(self, call: Call, body: schemas.ChangeAccount) -> Reply[schemas.User]:
        """Change the own account"""
        account = await self._accounts.change(call.user_id, body, call.expected_version())
        return Reply(schemas.User.of(account), account.version)

    async def delete_own_account(self, call: Call) -> Reply[None]:
        """Delete the own account and all that belongs to it"""
        await self._accounts.delete(call.user_id, call.expected_version())
        return NO_CONTENT

    async def list_security_events(self, call: Call, query: PageQuery) -> Reply[Page[schemas.SecurityEvent]]:
        """What happened to the own account"""
        found = await self._accounts.security_events(call.user_id, query)
        return Reply(page(found, query, schemas.SecurityEvent.of, lambda e: e.id))

    async def change_password(self, call: Call, body: schemas.ChangePassword) -> Reply[None]:
        """Change the own password; other sessions end"""
        await self._credentials.change_password(call.principal, body.current_password, body.new_password, _client(call))
        return NO_CONTENT

    async def request_verification(self, call: Call) -> Reply[None]:
        """Have a link sent that proves the own address"""
        await self._credentials.request_verification(call.user_id, _client(call))
        return NO_CONTENT

    async def verify_email(self, call: Call, token: str) -> Reply[None]:
        """Prove an address with the token of such a link"""
        await self._credentials.verify_email(token, _client(call))
        return NO_CONTENT

    async def request_reset(self, call: Call, body: schemas.RequestReset) -> Reply[None]:
        """Have a link sent that resets the password, if there is such an account"""
        await self._credentials.request_reset(body.email, _client(call))
        return NO_CONTENT

    async def reset_password(self, call: Call, token: str, body: schemas.ResetPassword) -> Reply[None]:
        """Set a new password with the token of such a link; all sessions end"""
        await self._credentials.reset_password(token, body.new_password, _client(call))
        return NO_CONTENT

    async def search_accounts(self, call: Call, query: schemas.AccountQuery) -> Reply[Page[schemas.AdminUser]]:
        """Find accounts by address, name or id"""
        found = await self._administration.search(call.user_id, query)
        return Reply(page(found, query, schemas.AdminUser.of, lambda account: account.id))

    async def change_account(self, call: Call, user_id: UUID, body: schemas.AdminChange) -> Reply[schemas.AdminUser]:
        """Change somebody's role, or disable the account; then its sessions end"""
        account = await self._administration.change(call.user_id, user_id, body, call.expected_version())
        return Reply(schemas.AdminUser.of(account), account.version)

    async def get_profile(self, call: Call, user_id: UUID) -> Reply[schemas.PublicProfile]:
        """What everybody may see of a user"""
        profile = await self._accounts.profile(user_id)
        return Reply(schemas.PublicProfile.of(profile), profile.version)

    async def get_key_set(self, call: Call) -> Reply[schemas.JwkSet]:
        """The public keys that access tokens are verified with"""
        keys = await self._keys.public_keys()
        jwks = [schemas.Jwk(kid, base64.urlsafe_b64encode(raw).decode().rstrip("=")) for kid, raw in keys.items()]
        return Reply(schemas.JwkSet(jwks), headers={"Cache-Control": "public, max-age=60"})


def _client(call: Call) -> Client:
    headers = call.request.headers
    forwarded = headers.get("X-Forwarded-For", "").rpartition(",")[2].strip()
    device = _printable(headers.get("User-Agent", ""))
    return Client(device[:_DEVICE_LENGTH], _printable(forwarded)[:45] or call.request.remote or "")


def _printable(header: str) -> str:
    """Without bytes that are no UTF-8, which the database would not take."""
    return "".join(c for c in header if c.isprintable())
