"""Registering, reading, changing and deleting accounts."""

import asyncio
from collections.abc import Sequence
from uuid import UUID

import msgspec

from services.users import models
from services.users.errors import LastAdministrator, NotAnAddress, WeakPassword
from services.users.events import SealedLink, UserDeleted, UserRegistered, UserUpdated
from services.users.models import Account, Client, Happening, Profile, Purpose, SecurityEvent
from services.users.passwords import Passwords, is_common
from services.users.repository import accounts as repository
from services.users.repository import audit as events
from services.users.schemas import ChangeAccount
from services.users.service.audit import note
from services.users.service.links import Links
from services.users.throttle import Throttle
from shared import forgetting
from shared.auth import Role
from shared.cache import Cache
from shared.database import Database, Transaction
from shared.errors import NotFound, PreconditionFailed, Unauthenticated
from shared.idempotency import KeyReused, Once
from shared.ids import new_id
from shared.loader import Loader
from shared.outbox import Outbox
from shared.paging import PageQuery


class Accounts:
    def __init__(
        self,
        db: Database,
        outbox: Outbox,
        passwords: Passwords,
        profiles: Cache[Profile],
        links: Links,
        throttle: Throttle,
    ) -> None:
        self._db = db
        self._outbox = outbox
        self._passwords = passwords
        self._profiles = profiles
        self._profile_rows = Loader(db, repository.get_profiles)
        self._account_rows = Loader(db, repository.get_accounts)
        self._links = links
        self._throttle = throttle

    async def register(self, email: str, password: str, display_name: str, client: Client, once: Once) -> Account:
        """Raises `AddressTaken`, `NotAnAddress`, `WeakPassword`."""
        address = new_address(email)
        if is_common(password):
            raise WeakPassword("/password")
        password_hash = await self._passwords.hash(password)
        async with self._db.transaction() as tx:
            if (earlier := await once.find(tx, Account)) is None:
                account = await repository.insert_account(tx, new_id(), address, password_hash, display_name)
                await note(tx, account.id, Happening.REGISTERED, client)
                link = await self._links.issue(tx, account.id, Purpose.VERIFY_EMAIL)
                assert link is not None  # the first
                await self._outbox.add(tx, registered(account, link))
                await once.keep(tx, account)
                return account
            stored = await repository.get_password_hash(tx, earlier.id)
        if not await self._passwords.verify(stored, password):  # which the fingerprint does not hold
            raise KeyReused
        return earlier

    async def account(self, account_id: UUID) -> Account:
        account = await self._account_rows.get(account_id)
        if account is None:
            # A token is proof enough to look where the account must be: a replica may not have it yet.
            async with self._db.transaction() as tx:
                account = await repository.get_account(tx, account_id)
        if account is None or account.disabled:
            raise Unauthenticated("the account is gone")
        return account

    async def change(self, account_id: UUID, change: ChangeAccount, expected_version: int | None) -> Account:
        """Raises `PreconditionFailed` when the account is not at `expected_version` any more."""
        async with self._db.transaction() as tx:
            account = await locked(tx, account_id, expected_version)
            given = {
                name: value for name, value in msgspec.structs.asdict(change).items() if value is not msgspec.UNSET
            }
            if not given:
                return account
            account = await repository.update_account(tx, msgspec.structs.replace(account, **given))
            await self._profiles.note(tx, str(account_id), account.version)
            await self._outbox.add(tx, updated(account))
        # Shielded: a caller that goes away must not leave what it has changed in the cache.
        await asyncio.shield(self._profiles.invalidate(str(account_id), account.version))
        return account

    async def delete(self, account_id: UUID, expected_version: int | None) -> None:
        """Forget the user, here at once, elsewhere by the event. Raises `PreconditionFailed`, `LastAdministrator`."""
        async with self._db.transaction() as tx:
            await forgetting.forget(tx, account_id)
            administrators = await repository.lock_administrators_with(tx, account_id)
            account = await locked(tx, account_id, expected_version)
            if account.role is Role.ADMIN and not administrators - {account_id}:
                raise LastAdministrator
            await repository.delete_account(tx, account)
            await self._profiles.note(tx, str(account_id), account.version + 1)
            await self._outbox.add(tx, UserDeleted(user_id=account_id))
        await asyncio.shield(self._profiles.invalidate(str(account_id), account.version + 1))
        await self._throttle.reset(account.email)

    async def security_events(self, account_id: UUID, query: PageQuery) -> Sequence[SecurityEvent]:
        return await self._db.read(events.list_security_events, account_id, query.before(), query.limit + 1)

    async def profile(self, account_id: UUID) -> Profile:
        profile = await self._profiles.get(str(account_id), lambda: self._profile_rows.get(account_id))
        if profile is None:
            raise NotFound
        return profile


def new_address(text: str) -> str:
    """The address of an account to be, as it is stored and written to (docs/adr/0045). Raises `NotAnAddress`."""
    address = models.normalised_address(text)
    if address is None:
        raise NotAnAddress
    if not models.keeps_its_letters(text):
        raise NotAnAddress("has a letter, such as ß or ﬁ, that stands for others: mail could go to somebody else")
    return address


async def locked(tx: Transaction, account_id: UUID, expected_version: int | None = None) -> Account:
    """The own account, which nobody else changes until `tx` ends. Raises `PreconditionFailed`."""
    account = await repository.get_account_for_update(tx, account_id)
    if account is None or account.disabled:
        raise Unauthenticated("the account is gone")
    if expected_version not in (None, account.version):
        raise PreconditionFailed
    return account


def registered(account: Account, link: SealedLink) -> UserRegistered:
    return UserRegistered(
        user_id=account.id,
        email=account.email,
        display_name=account.display_name,
        locale=account.locale,
        version=account.version,
        email_verified=account.email_verified,
        link=link,
    )


def updated(account: Account) -> UserUpdated:
    return UserUpdated(
        user_id=account.id,
        email=account.email,
        display_name=account.display_name,
        locale=account.locale,
        version=account.version,
        email_verified=account.email_verified,
    )
