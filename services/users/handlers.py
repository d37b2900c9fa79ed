"""Parse, one call to the service, answer."""

import base64
from uuid import UUID

from services.users import schemas
from services.users.keys import SigningKeys
from services.users.models import Client
from services.users.service import Users
from shared.application import NO_CONTENT, Call, Reply
from shared.paging import Page, PageQuery, page

_DEVICE_LENGTH = 200


class Handlers:
    def __init__(self, users: Users, keys: SigningKeys) -> None:
        self._users = users
        self._keys = keys

    async def register(self, call: Call, body: schemas.Register) -> Reply[schemas.User]:
        """Make an account"""
        # The password is left out of the fingerprint: a fast hash of it must not lie in the database.
        once = call.once(f"{body.email}\n{body.display_name}".encode())
        account = await self._users.register(body.email, body.password, body.display_name, once)
        return Reply(schemas.User.of(account), account.version, {"Location": f"/api/v1/users/{account.id}"})

    async def log_in(self, call: Call, body: schemas.LogIn) -> Reply[schemas.SessionTokens]:
        """Open a session"""
        tokens = await self._users.log_in(body.email, body.password, _client(call))
        return Reply(schemas.SessionTokens.of(tokens))

    async def refresh(self, call: Call, body: schemas.Refresh) -> Reply[schemas.SessionTokens]:
        """Spend a refresh token for new tokens"""
        tokens = await self._users.refresh(body.refresh_token, _client(call))
        return Reply(schemas.SessionTokens.of(tokens))

    async def list_sessions(self, call: Call, query: PageQuery) -> Reply[Page[schemas.SessionEntry]]:
        """List the own sessions"""
        current = call.principal.session_id
        found = await self._users.sessions(call.user_id, query)
        return Reply(page(found, query, lambda s: schemas.SessionEntry.of(s, current), lambda s: s.id))

    async def end_current_session(self, call: Call) -> Reply[None]:
        """Log out"""
        await self._users.end_session(call.user_id, call.principal.session_id)
        return NO_CONTENT

    async def end_session(self, call: Call, session_id: UUID) -> Reply[None]:
        """Log one session out"""
        await self._users.end_session(call.user_id, session_id)
        return NO_CONTENT

    async def end_sessions(self, call: Call) -> Reply[None]:
        """Log all sessions out"""
        await self._users.end_sessions(call.user_id)
        return NO_CONTENT

    async def get_own_account(self, call: Call) -> Reply[schemas.User]:
        """The own account"""
        account = await self._users.account(call.user_id)
        return Reply(schemas.User.of(account), account.version)

    async def change_own_account(self, call: Call, body: schemas.ChangeAccount) -> Reply[schemas.User]:
        """Change the own account"""
        account = await self._users.change(call.user_id, body, call.expected_version())
        return Reply(schemas.User.of(account), account.version)

    async def get_profile(self, call: Call, user_id: UUID) -> Reply[schemas.PublicProfile]:
        """What everybody may see of a user"""
        profile = await self._users.profile(user_id)
        return Reply(schemas.PublicProfile.of(profile), profile.version)

    async def get_key_set(self, call: Call) -> Reply[schemas.JwkSet]:
        """The public keys that access tokens are verified with"""
        keys = await self._keys.public_keys()
        jwks = [schemas.Jwk(kid, base64.urlsafe_b64encode(raw).decode().rstrip("=")) for kid, raw in keys.items()]
        return Reply(schemas.JwkSet(jwks), headers={"Cache-Control": "public, max-age=60"})


def _client(call: Call) -> Client:
    forwarded = call.request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip()
    device = "".join(c for c in call.request.headers.get("User-Agent", "") if c.isprintable())
    return Client(device[:_DEVICE_LENGTH], forwarded[:45] or call.request.remote or "")
