"""Logging in, keeping on, logging out."""

import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from services.users import models
from services.users.errors import AccountDisabled, InvalidRefreshToken, WrongCredentials
from services.users.keys import SigningKeys
from services.users.models import Client, Happening, Session, Tokens
from services.users.passwords import Passwords
from services.users.repository import accounts
from services.users.repository import sessions as repository
from services.users.service.audit import LateNotes, note
from services.users.service.links import digest
from services.users.settings import Settings
from services.users.throttle import Throttle
from shared.auth import Principal, Role
from shared.clock import Clock
from shared.database import Database, Transaction
from shared.errors import NotFound
from shared.ids import new_id
from shared.paging import PageQuery

# A client whose answer was lost asks again with the token it has just spent: that is no theft.
_GRACE_SECONDS = 10.0


class Sessions:
    def __init__(
        self,
        db: Database,
        passwords: Passwords,
        keys: SigningKeys,
        throttle: Throttle,
        late_notes: LateNotes,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._db = db
        self._passwords = passwords
        self._keys = keys
        self._throttle = throttle
        self._late_notes = late_notes
        self._settings = settings
        self._clock = clock

    async def log_in(self, email: str, password: str, client: Client) -> Tokens:
        """Open a session, after the same work whether there is such an account or not.

        Raises `WrongCredentials`, `TooManyAttempts`, `AccountDisabled` (to who knows the password).
        """
        address = models.normalised_address(email) or email
        async with self._db.transaction() as tx:  # the primary: who has just registered logs in at once
            found = await accounts.get_credentials(tx, address, client.address)
        attempt = await self._throttle.begin(address, client, familiar=found is not None and found.familiar)
        good = await self._passwords.verify(found.password_hash if found else None, password)
        if found is None:
            raise WrongCredentials
        account_id, stored = found.account_id, found.password_hash
        if not good:
            self._late_notes.add(account_id, Happening.LOGIN_FAILED, client)
            raise WrongCredentials
        await self._throttle.succeeded(attempt)
        if found.disabled:
            raise AccountDisabled
        fresh = await self._passwords.hash(password) if self._passwords.is_outdated(stored) else None
        session_id = new_id()
        async with self._db.transaction() as tx:
            unchanged = await accounts.lock_credentials(tx, account_id, stored)
            if unchanged:
                if fresh is not None:
                    await accounts.set_password_hash(tx, account_id, fresh)
                await repository.insert_session(tx, session_id, account_id, client, self._session_end())
                refresh_token = await self._issue_refresh_token(tx, session_id)
                await note(tx, account_id, Happening.LOGGED_IN, client)
        if not unchanged:
            # A new password, or an end of the account, has ended all sessions: this must not open one after that.
            return await self.log_in(email, password, client)
        return self._tokens(account_id, session_id, Role(found.role), refresh_token)

    async def refresh(self, refresh_token: str, client: Client) -> Tokens:
        """Spend the token for new ones. A token spent before ends its session, for one of the two holders stole it."""
        spent = digest(refresh_token)
        async with self._db.transaction() as tx:
            found = await repository.get_refresh_token_for_update(tx, spent)
            if found is None or found.disabled:
                raise InvalidRefreshToken
            session = found.session
            reused = found.spent_seconds_ago is not None and not (
                found.spent_seconds_ago < _GRACE_SECONDS and session.device == client.device
            )
            if reused:
                await repository.delete_session(tx, session.account_id, session.id)
                await note(tx, session.account_id, Happening.REFRESH_TOKEN_REUSED, client)
            else:
                await repository.spend_refresh_token(tx, spent, session.id, self._settings.refresh_token_seconds)
                await repository.touch_session(tx, session.id, self._session_end())
                following = await self._issue_refresh_token(tx, session.id)
        if reused:
            raise InvalidRefreshToken
        return self._tokens(session.account_id, session.id, Role(found.role), following)

    async def list(self, account_id: UUID, query: PageQuery) -> Sequence[Session]:
        return await self._db.read(repository.list_sessions, account_id, query.before(), query.limit + 1)

    async def end(self, account_id: UUID, session_id: UUID, client: Client) -> None:
        async with self._db.transaction() as tx:
            if not await repository.delete_session(tx, account_id, session_id):
                raise NotFound
            await note(tx, account_id, Happening.SESSION_ENDED, client)

    async def end_all(self, account_id: UUID, client: Client) -> None:
        async with self._db.transaction() as tx:
            await repository.delete_sessions(tx, account_id)
            await note(tx, account_id, Happening.SESSIONS_ENDED, client)

    async def _issue_refresh_token(self, tx: Transaction, session_id: UUID) -> str:
        token = secrets.token_urlsafe(32)
        await repository.insert_refresh_token(tx, digest(token), session_id)
        return token

    def _tokens(self, account_id: UUID, session_id: UUID, role: Role, refresh_token: str) -> Tokens:
        lifetime = self._settings.access_token_seconds
        expires_at = int(self._clock.now().timestamp()) + lifetime
        access_token = self._keys.sign(Principal(account_id, session_id, role, expires_at))
        return Tokens(access_token, refresh_token, lifetime)

    def _session_end(self) -> datetime:
        return self._clock.now() + timedelta(seconds=self._settings.refresh_token_seconds)
