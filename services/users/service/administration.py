"""What administrators do with the accounts of others."""

from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

import msgspec

from services.users.errors import OwnAccount, WeakPassword
from services.users.models import Account, Client, Happening, Profile, Purpose
from services.users.passwords import Passwords, is_common
from services.users.repository import accounts as repository
from services.users.repository import links, sessions
from services.users.schemas import AccountQuery, AdminChange
from services.users.service.accounts import new_address, registered, updated
from services.users.service.audit import note
from services.users.service.credentials import set_password
from services.users.service.links import Links
from shared.auth import Role
from shared.cache import Cache
from shared.database import Connection, Database, Transaction
from shared.errors import FieldError, Forbidden, InvalidInput, NotFound, PreconditionFailed
from shared.ids import new_id
from shared.outbox import Outbox


class Administration:
    """Every use case asks the database whether the caller is an administrator still; tokens are older than that."""

    def __init__(
        self, db: Database, outbox: Outbox, passwords: Passwords, profiles: Cache[Profile], links: Links
    ) -> None:
        self._db = db
        self._outbox = outbox
        self._passwords = passwords
        self._profiles = profiles
        self._links = links

    async def search(self, admin_id: UUID, query: AccountQuery) -> Sequence[Account]:
        async with self._db.transaction() as tx:
            await _require_admin(tx, admin_id)
            return await repository.search_accounts(tx, query.query, query.before(), query.limit + 1)

    async def change(self, admin_id: UUID, account_id: UUID, change: AdminChange, expected: int | None) -> Account:
        """Raises `OwnAccount`, so that there is always an administrator left; `NotFound`, `PreconditionFailed`."""
        async with self._db.transaction() as tx:
            # Both in one order: of two who demote each other, the second is no administrator any more.
            found = {each: await repository.get_account_for_update(tx, each) for each in sorted({admin_id, account_id})}
            admin, before = found[admin_id], found[account_id]
            if admin is None or not _is_admin(admin):
                raise Forbidden
            if before is None:
                raise NotFound
            if account_id == admin_id:
                raise OwnAccount
            if expected not in (None, before.version):
                raise PreconditionFailed
            role = before.role if change.role is msgspec.UNSET else Role(change.role)
            disabled = before.disabled if change.disabled is msgspec.UNSET else change.disabled
            if (role, disabled) == (before.role, before.disabled):
                return before
            account = await repository.update_account(tx, msgspec.structs.replace(before, role=role, disabled=disabled))
            await self._profiles.note(tx, str(account_id), account.version)
            if role is not before.role:
                await note(tx, account_id, Happening.ROLE_CHANGED)
            if disabled and not before.disabled:
                await sessions.delete_sessions(tx, account_id)
                await links.delete_tokens(tx, account_id, Purpose.RESET_PASSWORD)
            if disabled is not before.disabled:
                await note(tx, account_id, Happening.DISABLED if disabled else Happening.ENABLED)
            await self._outbox.add(tx, updated(account))
        await self._profiles.invalidate(str(account_id), account.version)
        return account

    async def create(
        self, email: str, ask_password: Callable[[], Awaitable[str]], client: Client
    ) -> tuple[Account, bool]:
        """An administrator with this address: who has proven it is promoted, else an account is made. Whether it was.

        An account whose address nobody has proven may be a stranger's, who waits for it to be promoted: it gets the
        password that is asked for, as a new one does, and loses its sessions.
        """
        address = new_address(email)
        async with self._db.transaction() as tx:
            found = await repository.get_account_by_email_for_update(tx, address)
            if found is not None and (found.email_verified or _is_admin(found)):
                return await self._promote(tx, found), False
        password = await ask_password()
        if not 8 <= len(password) <= 256:
            raise InvalidInput([FieldError("/password", "takes 8 to 256 characters")])
        if is_common(password):
            raise WeakPassword("/password")
        password_hash = await self._passwords.hash(password)
        async with self._db.transaction() as tx:
            if (found := await repository.get_account_by_email_for_update(tx, address)) is not None:
                await set_password(tx, self._outbox, found.id, password_hash, Happening.PASSWORD_RESET, client)
                return await self._promote(tx, found), False
            account = await repository.insert_account(tx, new_id(), address, password_hash, address.partition("@")[0])
            await note(tx, account.id, Happening.REGISTERED, client)
            link = await self._links.issue(tx, account.id, Purpose.VERIFY_EMAIL)
            assert link is not None  # the first
            await self._outbox.add(tx, registered(account, link))
            return await self._promote(tx, account), True

    async def _promote(self, tx: Transaction, account: Account) -> Account:
        promoted = msgspec.structs.replace(account, role=Role.ADMIN, disabled=False)
        if promoted == account:
            return account
        await note(tx, account.id, Happening.ROLE_CHANGED)
        promoted = await repository.update_account(tx, promoted)
        await self._profiles.note(tx, str(account.id), promoted.version)
        await self._outbox.add(tx, updated(promoted))
        return promoted


async def _require_admin(connection: Connection, account_id: UUID) -> None:
    account = await repository.get_account(connection, account_id)
    if account is None or not _is_admin(account):
        raise Forbidden


def _is_admin(account: Account) -> bool:
    return account.role is Role.ADMIN and not account.disabled
