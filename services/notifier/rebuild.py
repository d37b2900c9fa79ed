"""`python -m services.notifier rebuild`: what is known of users, again from the beginning of their topic.

For a projection that was lost or went wrong. It may run while workers do, and more than once: what is newer than an
event stays. Nobody gets anything twice, for only the projection is written. Users whose events the broker has let go of
keep what is known of them.
"""

import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from uuid import UUID

import msgspec

from services.notifier import campaign_repository, repository
from services.notifier.consumed import UserDeleted, UserRegistered, UserUpdated
from services.notifier.settings import Settings
from shared import forgetting, migrate
from shared.bus.replay import replay
from shared.database import Database, Transaction
from shared.events import Envelope
from shared.logs import get_logger
from shared.runner import Command, Process

log = get_logger()

NAME = "notifier"
_MIGRATIONS = Path(__file__).parent / "migrations"
_BATCH = 500
_PROFILES: dict[str, type[UserRegistered | UserUpdated]] = {kind.TYPE: kind for kind in (UserRegistered, UserUpdated)}


async def rebuild(process: Process, settings: Settings) -> int:
    if settings.bus != "kafka":
        print("notifier: BUS=inline keeps no events that could be read again", file=sys.stderr)  # noqa: T201
        return 1
    await migrate.require_current(settings.database_url, NAME, _MIGRATIONS)
    db = await process.enter(Database.opened(NAME, settings, process.health))
    events = await restore(db, replay([UserRegistered.TOPIC], settings, _BATCH))
    print(f"{events} events of users read")  # noqa: T201
    return 0


async def restore(db: Database, batches: AsyncIterator[Sequence[Envelope]]) -> int:
    """Write what the events say to the projection, each batch in a transaction; returns how many there were."""
    events = 0
    async for batch in batches:
        async with db.transaction() as tx:
            await _restore(tx, batch)
        events += len(batch)
    return events


async def _restore(tx: Transaction, batch: Sequence[Envelope]) -> None:
    newest: dict[UUID, UserRegistered | UserUpdated] = {}
    gone: set[UUID] = set()
    for envelope in batch:
        try:
            if envelope.type == UserDeleted.TYPE:
                gone.add(envelope.decode(UserDeleted).user_id)
            elif envelope.type in _PROFILES:
                profile = envelope.decode(_PROFILES[envelope.type])
                known = newest.get(profile.user_id)
                if known is None or known.version <= profile.version:
                    newest[profile.user_id] = profile
        except msgspec.DecodeError as error:
            log.warning("event_passed_over", event_id=str(envelope.id), reason=str(error))
    for user_id in sorted(gone):
        await forgetting.forget(tx, user_id)
        await campaign_repository.forget_user(tx, user_id)
        await repository.delete_recipient(tx, user_id)
    for user_id in sorted(newest.keys() - gone):
        if not await forgetting.is_forgotten(tx, user_id):
            profile = newest[user_id]
            await repository.restore_recipient(
                tx, user_id, profile.email, profile.display_name, profile.locale, profile.version
            )


COMMANDS = {"rebuild": Command(rebuild)}
