"""Campaigns: one text to many users, prepared in chunks that follow from one another, sent like any other email.

A chunk's emails, the note that it is handled and the event of the next chunk commit together, and a recipient has at
most one email of a campaign by a unique index. So wherever a worker dies, the preparation goes on where it was, and
nobody is written to twice. Memory is that of one chunk. Pausing and cancelling stop the claiming of emails, so they
take effect as soon as the few in hand have left.
"""

from collections.abc import Mapping, Sequence
from uuid import UUID

from services.notifier import campaign_repository as repository
from services.notifier.errors import CampaignEnded, UnknownTimeZone
from services.notifier.events import CampaignChunkQueued, CampaignCreated
from services.notifier.models import Campaign, CampaignState, Category, NewCampaign, Progress
from services.notifier.repository import add_refused_email
from shared import forgetting
from shared.clock import Clock
from shared.consumer import Delivery
from shared.database import Connection, Database
from shared.errors import NotFound, Unauthenticated
from shared.idempotency import Once
from shared.ids import new_id
from shared.outbox import Outbox
from shared.paging import PageQuery

CHUNK = 1000


class Campaigns:
    """The use cases of administrators."""

    def __init__(self, db: Database, outbox: Outbox, clock: Clock) -> None:
        self._db = db
        self._outbox = outbox
        self._clock = clock

    async def create(self, by: UUID, new: NewCampaign, once: Once) -> Progress:
        """Raises `UnknownTimeZone`."""
        async with self._db.transaction() as tx:
            if await forgetting.is_forgotten(tx, by):
                raise Unauthenticated("the account is gone")
            # Only the id is kept: the audience may name users, who may be forgotten.
            if (earlier := await once.find(tx, UUID)) is not None:
                campaign = await repository.get_campaign(tx, earlier)
                assert campaign is not None  # campaigns stay
            else:
                if new.window is not None and not await repository.is_time_zone(tx, new.window.time_zone):
                    raise UnknownTimeZone
                campaign = await repository.insert_campaign(tx, new_id(), new, by)
                await self._outbox.add(tx, CampaignCreated(campaign_id=campaign.id))
                await once.keep(tx, campaign.id)
        return self._progress(campaign.as_made(), {})

    async def get(self, campaign_id: UUID) -> Progress:
        async def ask(connection: Connection) -> Progress:
            campaign = await repository.get_campaign(connection, campaign_id)
            if campaign is None:
                raise NotFound
            return self._progress(campaign, await self._count(connection, campaign))

        return await self._db.read(ask)

    async def list(self, query: PageQuery) -> Sequence[Progress]:
        async def ask(connection: Connection) -> Sequence[Progress]:
            campaigns = await repository.list_campaigns(connection, query.before(), query.limit + 1)
            return [self._progress(campaign, await self._count(connection, campaign)) for campaign in campaigns]

        return await self._db.read(ask)

    async def pause(self, campaign_id: UUID) -> Progress:
        return await self._turn(campaign_id, CampaignState.PAUSED)

    async def resume(self, campaign_id: UUID) -> Progress:
        return await self._turn(campaign_id, CampaignState.RUNNING)

    async def cancel(self, campaign_id: UUID) -> Progress:
        return await self._turn(campaign_id, CampaignState.CANCELLED)

    async def _turn(self, campaign_id: UUID, state: CampaignState) -> Progress:
        """Raises `CampaignEnded` when it is cancelled or done."""
        async with self._db.transaction() as tx:
            campaign = await repository.get_campaign_for_update(tx, campaign_id)
            if campaign is None:
                raise NotFound
            counts = await self._count(tx, campaign)
            now = self._progress(campaign, counts)
            if now.state in (CampaignState.CANCELLED, CampaignState.DONE) and now.state != state:
                raise CampaignEnded
            await repository.set_state(tx, campaign_id, state)
            changed = await repository.get_campaign(tx, campaign_id)
        assert changed is not None
        return self._progress(changed, counts)

    async def unsubscribe(self, token: UUID) -> None:
        """No campaign is sent to the holder of this token any more, from now on. Raises `NotFound`."""
        async with self._db.transaction() as tx:
            user_id = await repository.get_user_of_token(tx, token)
            if user_id is None:
                raise NotFound
            await add_refused_email(tx, user_id, Category.CAMPAIGN)

    async def check_token(self, token: UUID) -> None:
        """Raises `NotFound` unless an unsubscribe link carries this token."""
        if await self._db.read(repository.get_user_of_token, token) is None:
            raise NotFound

    @staticmethod
    async def _count(connection: Connection, campaign: Campaign) -> Mapping[str, int]:
        """Its emails by state; nothing where the books are closed."""
        return await repository.count_emails(connection, campaign.id) if campaign.counts is None else {}

    def _progress(self, campaign: Campaign, counts: Mapping[str, int]) -> Progress:
        return Progress.of(campaign, counts, self._clock.now())


class Preparation:
    """Puts the emails of a campaign into the queue, a chunk an event."""

    def __init__(self, outbox: Outbox, message_domain: str) -> None:
        self._outbox = outbox
        self._message_domain = message_domain

    async def begin(self, delivery: Delivery[CampaignCreated]) -> None:
        await self._queue_chunk(delivery, delivery.event.campaign_id, None)

    async def go_on(self, delivery: Delivery[CampaignChunkQueued]) -> None:
        await self._queue_chunk(delivery, delivery.event.campaign_id, delivery.event.last_user_id)

    async def _queue_chunk(
        self, delivery: Delivery[CampaignCreated] | Delivery[CampaignChunkQueued], campaign_id: UUID, after: UUID | None
    ) -> None:
        async with delivery.transaction() as tx:
            campaign = await repository.get_campaign_for_update(tx, campaign_id)
            if campaign is None or campaign.state == CampaignState.CANCELLED:
                return
            users = await repository.list_audience(tx, campaign, after, CHUNK)
            emails = [(new_id(), user_id) for user_id in users]
            await repository.queue_emails(tx, campaign_id, Category.CAMPAIGN, emails, self._message_domain)
            if len(users) == CHUNK:
                await self._outbox.add(tx, CampaignChunkQueued(campaign_id=campaign_id, last_user_id=users[-1]))
            else:
                await repository.set_prepared(tx, campaign_id)
