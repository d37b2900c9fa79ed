"""Proving an address, and changing or resetting a password."""

import asyncio
from contextlib import suppress
from uuid import UUID

import asyncpg
import msgspec

from services.users import models
from services.users.errors import LinkNotValid, WeakPassword, WrongPassword
from services.users.events import UserPasswordChanged, UserPasswordResetRequested, UserVerificationRequested
from services.users.models import Account, Client, Happening, Profile, Purpose
from services.users.passwords import Passwords, is_common
from services.users.repository import accounts, sessions
from services.users.repository import links as repository
from services.users.service.accounts import locked, updated
from services.users.service.audit import note
from services.users.service.links import Links, digest
from services.users.throttle import Throttle
from shared.auth import Principal
from shared.cache import Cache
from shared.database import Database, Transaction
from shared.errors import TenfoldError, Unauthenticated
from shared.ids import new_id
from shared.logs import get_logger
from shared.outbox import Outbox

log = get_logger()

_BATCH = 20
_POLL_SECONDS = 1.0


class Credentials:
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
        self._links = links
        self._throttle = throttle
        self._asked = asyncio.Event()

    async def request_verification(self, account_id: UUID, client: Client) -> None:
        """Have the owner sent a link, unless the address is proven or there are enough links under way."""
        async with self._db.transaction() as tx:
            account = await locked(tx, account_id)
            if account.email_verified:
                return
            if (link := await self._links.issue(tx, account_id, Purpose.VERIFY_EMAIL)) is None:
                return
            await note(tx, account_id, Happening.VERIFICATION_REQUESTED, client)
            await self._outbox.add(tx, UserVerificationRequested(user_id=account_id, link=link))

    async def verify_email(self, token: str, client: Client) -> None:
        """Raises `LinkNotValid`."""
        async with self._db.transaction() as tx:
            account = await self._spend(tx, token, Purpose.VERIFY_EMAIL)
            account = await self._prove_address(tx, account, client)
        await self._profiles.invalidate(str(account.id), account.version)

    async def request_reset(self, email: str, client: Client) -> None:
        """Note the wish. What there is to do is done after the answer, so the time tells nothing of the address."""
        address = models.normalised_address(email) or email
        async with self._db.transaction() as tx:
            await repository.insert_reset_request(tx, new_id(), repository.ResetRequest(address, client))
            tx.after_commit(self._asked.set)

    async def keep_sending_resets(self) -> None:
        """Work off what was asked for, in this process or one that went away, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._asked.wait()
            self._asked.clear()
            try:
                while await self._send_resets() == _BATCH:
                    pass
            except (TenfoldError, asyncpg.PostgresError) as error:
                log.warning("resets_not_sent", error=str(error))

    async def _send_resets(self) -> int:
        async with self._db.transaction() as tx:
            requests = await repository.take_reset_requests(tx, _BATCH)
            found = await accounts.get_accounts_by_email_for_update(tx, [request.email for request in requests])
            for request in requests:
                account = found.get(request.email)
                if account is None or account.disabled:
                    continue
                if (link := await self._links.issue(tx, account.id, Purpose.RESET_PASSWORD)) is not None:
                    await note(tx, account.id, Happening.RESET_REQUESTED, request.client)
                    await self._outbox.add(tx, UserPasswordResetRequested(user_id=account.id, link=link))
        return len(requests)

    async def reset_password(self, token: str, password: str, client: Client) -> None:
        """Set the password and end all sessions. Raises `LinkNotValid`, `WeakPassword`."""
        if is_common(password):
            raise WeakPassword("/new_password")
        async with self._db.transaction() as tx:  # before the costly hash
            if await repository.get_owner_of_token(tx, digest(token), Purpose.RESET_PASSWORD) is None:
                raise LinkNotValid
        password_hash = await self._passwords.hash(password)
        async with self._db.transaction() as tx:
            account = await self._spend(tx, token, Purpose.RESET_PASSWORD)
            await set_password(tx, self._outbox, account.id, password_hash, Happening.PASSWORD_RESET, client)
            account = await self._prove_address(tx, account, client)
        await self._profiles.invalidate(str(account.id), account.version)
        await self._throttle.reset(account.email)

    async def change_password(self, principal: Principal, current: str, new: str, client: Client) -> None:
        """Set the password and end all sessions but the caller's.

        Raises `WrongPassword`, `TooManyAttempts`, `WeakPassword`.
        """
        async with self._db.transaction() as tx:
            account = await locked(tx, principal.user_id)
            stored = await accounts.get_password_hash(tx, account.id)
        attempt = await self._throttle.begin(account.email, client, familiar=True)
        if not await self._passwords.verify(stored, current):
            raise WrongPassword
        await self._throttle.succeeded(attempt)
        if is_common(new):
            raise WeakPassword("/new_password")
        password_hash = await self._passwords.hash(new)
        async with self._db.transaction() as tx:
            await locked(tx, account.id)
            if await accounts.get_password_hash(tx, account.id) != stored:
                raise WrongPassword  # it was changed meanwhile
            await set_password(
                tx, self._outbox, account.id, password_hash, Happening.PASSWORD_CHANGED, client, principal.session_id
            )

    async def _spend(self, tx: Transaction, token: str, purpose: Purpose) -> Account:
        owner = await repository.get_owner_of_token(tx, digest(token), purpose)
        if owner is None:
            raise LinkNotValid
        try:
            # Before the token, as whoever sets a password does: else each would wait for the other.
            account = await locked(tx, owner)
        except Unauthenticated:
            raise LinkNotValid from None
        if not await repository.spend_token(tx, digest(token), purpose):
            raise LinkNotValid  # somebody else has spent it meanwhile
        return account

    async def _prove_address(self, tx: Transaction, account: Account, client: Client) -> Account:
        """Who has used a link from an email reads that address."""
        await repository.delete_tokens(tx, account.id, Purpose.VERIFY_EMAIL)
        if account.email_verified:
            return account
        account = await accounts.update_account(tx, msgspec.structs.replace(account, email_verified=True))
        await self._profiles.note(tx, str(account.id), account.version)
        await note(tx, account.id, Happening.EMAIL_VERIFIED, client)
        await self._outbox.add(tx, updated(account))
        return account


async def set_password(
    tx: Transaction,
    outbox: Outbox,
    account_id: UUID,
    password_hash: str,
    what: Happening,
    client: Client,
    but: UUID | None = None,
) -> None:
    """With all that follows: no session `but` one and no link to set another stays, and the owner is told."""
    await accounts.set_password_hash(tx, account_id, password_hash)
    await sessions.delete_sessions(tx, account_id, but=but)
    await repository.delete_tokens(tx, account_id, Purpose.RESET_PASSWORD)
    await note(tx, account_id, what, client)
    await outbox.add(tx, UserPasswordChanged(user_id=account_id))
