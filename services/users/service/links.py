"""The tokens of links that go out by email: random, single use, kept as hashes, sealed on their way to notifier."""

import hashlib
import secrets
from uuid import UUID

from services.users.events import SealedLink
from services.users.models import Purpose
from services.users.repository import links as repository
from services.users.settings import Settings
from shared.database import Transaction
from shared.sealing import link_cipher

# More than that in the time that one is good are not sent: nobody's mailbox is to be filled.
_AT_MOST = 3


class Links:
    def __init__(self, settings: Settings) -> None:
        self._cipher = link_cipher(settings.link_secret)

    async def issue(self, tx: Transaction, account_id: UUID, purpose: Purpose) -> SealedLink | None:
        """A new link; `None` when the account has enough. The caller holds the account's lock."""
        token = secrets.token_urlsafe(32)
        if not await repository.insert_one_time_token(tx, digest(token), account_id, purpose, _AT_MOST):
            return None
        return SealedLink(self._cipher.encrypt(token.encode()).decode(), purpose.valid_hours)


def digest(token: str) -> bytes:
    """What is stored of a token. It is random, so a fast hash will do."""
    return hashlib.sha256(token.encode()).digest()
