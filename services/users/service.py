"""The use cases of users. Each owns its transaction; none knows HTTP or SQL."""

import hashlib
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

import msgspec

from services.users import models, repository
from services.users.errors import InvalidRefreshToken, NotAnAddress, WeakPassword, WrongCredentials
from services.users.events import UserRegistered, UserUpdated
from services.users.keys import SigningKeys
from services.users.models import Account, Client, Profile, Session, Tokens
from services.users.passwords import Passwords, is_common
from services.users.schemas import ChangeAccount
from services.users.settings import Settings
from shared.auth import Principal, Role
from shared.cache import Cache
from shared.clock import Clock
from shared.database import Database, Transaction
from shared.errors import NotFound, PreconditionFailed, Unauthenticated
from shared.idempotency import Once
from shared.ids import new_id
from shared.loader import Loader
from shared.outbox import Outbox
from shared.paging import PageQuery

# A client whose answer was lost asks again with the token it has just spent: that is no theft.
_GRACE_SECONDS = 10.0


class Users:
    def __init__(
        self,
        db: Database,
        outbox: Outbox,
        passwords: Passwords,
        keys: SigningKeys,
        profiles: Cache[Profile],
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._db = db
        self._outbox = outbox
        self._passwords = passwords
        self._keys = keys
        self._profiles = profiles
        self._profile_rows = Loader(db, repository.get_profiles)
        self._account_rows = Loader(db, repository.get_accounts)
        self._settings = settings
        self._clock = clock

    async def register(self, email: str, password: str, display_name: str, once: Once) -> Account:
        """Raises `AddressTaken`, `NotAnAddress`, `WeakPassword`."""
        address = models.normalised_address(email)
        if address is None:
            raise NotAnAddress
        if is_common(password):
            raise WeakPassword("/password")
        password_hash = await self._passwords.hash(password)
        async with self._db.transaction() as tx:
            if (earlier := await once.find(tx, Account)) is not None:
                return earlier
            account = await repository.insert_account(tx, new_id(), address, password_hash, display_name)
            await self._outbox.add(
                tx,
                UserRegistered(
                    user_id=account.id,
                    email=account.email,
                    display_name=account.display_name,
                    locale=account.locale,
                    version=account.version,
                ),
            )
            await once.keep(tx, account)
        return account

    async def log_in(self, email: str, password: str, client: Client) -> Tokens:
        """Open a session. Raises `WrongCredentials`, after the same work whether there is such an account or not."""
        address = models.normalised_address(email) or ""
        async with self._db.transaction() as tx:  # the primary: who has just registered logs in at once
            found = await repository.get_credentials(tx, address)
        account, stored = found or (None, None)
        if not await self._passwords.verify(stored, password) or account is None or stored is None:
            raise WrongCredentials
        fresh = await self._passwords.hash(password) if self._passwords.is_outdated(stored) else None
        session_id = new_id()
        async with self._db.transaction() as tx:
            if fresh is not None:
                await repository.update_password_hash(tx, account.id, stored, fresh)
            await repository.insert_session(tx, session_id, account.id, client, self._session_end())
            refresh_token = await self._issue_refresh_token(tx, session_id)
        return self._tokens(account.id, session_id, account.role, refresh_token)

    async def refresh(self, refresh_token: str, client: Client) -> Tokens:
        """Spend the token for new ones. A token spent before ends its session, for one of the two holders stole it."""
        digest = _digest(refresh_token)
        async with self._db.transaction() as tx:
            found = await repository.get_refresh_token_for_update(tx, digest)
            if found is None:
                raise InvalidRefreshToken
            session = found.session
            reused = found.spent_seconds_ago is not None and not (
                found.spent_seconds_ago < _GRACE_SECONDS and session.device == client.device
            )
            if reused:
                await repository.delete_session(tx, session.account_id, session.id)
            else:
                await repository.spend_refresh_token(tx, digest)
                await repository.touch_session(tx, session.id, self._session_end())
                following = await self._issue_refresh_token(tx, session.id)
        if reused:
            raise InvalidRefreshToken
        return self._tokens(session.account_id, session.id, Role(found.role), following)

    async def sessions(self, account_id: UUID, query: PageQuery) -> Sequence[Session]:
        return await self._db.read(repository.list_sessions, account_id, query.before(), query.limit + 1)

    async def end_session(self, account_id: UUID, session_id: UUID) -> None:
        async with self._db.transaction() as tx:
            if not await repository.delete_session(tx, account_id, session_id):
                raise NotFound

    async def end_sessions(self, account_id: UUID) -> None:
        async with self._db.transaction() as tx:
            await repository.delete_sessions(tx, account_id)

    async def account(self, account_id: UUID) -> Account:
        account = await self._account_rows.get(account_id)
        if account is None:
            raise Unauthenticated("the account is gone")
        return account

    async def change(self, account_id: UUID, change: ChangeAccount, expected_version: int | None) -> Account:
        """Raises `PreconditionFailed` when the account is not at `expected_version` any more."""
        async with self._db.transaction() as tx:
            account = await repository.get_account_for_update(tx, account_id)
            if account is None:
                raise Unauthenticated("the account is gone")
            if expected_version not in (None, account.version):
                raise PreconditionFailed
            given = {
                name: value for name, value in msgspec.structs.asdict(change).items() if value is not msgspec.UNSET
            }
            if not given:
                return account
            account = await repository.update_account(tx, msgspec.structs.replace(account, **given))
            await self._outbox.add(
                tx,
                UserUpdated(
                    user_id=account.id,
                    email=account.email,
                    display_name=account.display_name,
                    locale=account.locale,
                    version=account.version,
                ),
            )
        await self._profiles.invalidate(str(account_id), account.version)
        return account

    async def profile(self, account_id: UUID) -> Profile:
        profile = await self._profiles.get(str(account_id), lambda: self._profile_rows.get(account_id))
        if profile is None:
            raise NotFound
        return profile

    async def _issue_refresh_token(self, tx: Transaction, session_id: UUID) -> str:
        token = secrets.token_urlsafe(32)
        await repository.insert_refresh_token(tx, _digest(token), session_id)
        return token

    def _tokens(self, account_id: UUID, session_id: UUID, role: Role, refresh_token: str) -> Tokens:
        lifetime = self._settings.access_token_seconds
        expires_at = int(self._clock.now().timestamp()) + lifetime
        access_token = self._keys.sign(Principal(account_id, session_id, role, expires_at))
        return Tokens(access_token, refresh_token, lifetime)

    def _session_end(self) -> datetime:
        return self._clock.now() + timedelta(seconds=self._settings.refresh_token_seconds)


def _digest(token: str) -> bytes:
    """Only the hash of a refresh token is stored; it is random, so a fast hash will do."""
    return hashlib.sha256(token.encode()).digest()
