"""Campaigns: one text to many users, prepared in chunks that follow from one another, sent like any other email.

A chunk's emails, the note that it is handled and the event of the next chunk commit together, and a recipient has at
most one email of a campaign by a unique index. So wherever a worker dies, the preparation goes on where it was, and
nobody is written to twice. Memory is that of one chunk. Pausing and cancelling stop the claiming of emails, so they
take effect as soon as the few in hand have left.
"""

from collections.abc import Mapping, Sequence
from uuid import UUID

from services.notifier import campaign_repository as repository
from services.notifier.errors import CampaignEnded
from services.notifier.events import CampaignChunkQueued, CampaignCreated
from services.notifier.models import Campaign, CampaignState, Category, Progress
from services.notifier.repository import add_refused_email
from services.notifier.schemas import NewCampaign
from shared.clock import Clock
from shared.consumer import Delivery
from shared.database import Connection, Database
from shared.errors import NotFound
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
        campaign = Campaign.drafted(new_id(), new.name, new.subject, new.text, new.html, new.audience.model())
        async with self._db.transaction() as tx:
            if (earlier := await once.find(tx, Campaign)) is not None:
                campaign = earlier
            else:
                campaign = await repository.insert_campaign(tx, campaign, by, new.send_at)
                await self._outbox.add(tx, CampaignCreated(campaign_id=campaign.id))
                await once.keep(tx, campaign)
        return self._progress(campaign, {})

    async def get(self, campaign_id: UUID) -> Progress:
        async def ask(connection: Connection) -> Progress:
            campaign = await repository.get_campaign(connection, campaign_id)
            if campaign is None:
                raise NotFound
            counts = await repository.count_emails(connection, [campaign_id])
            return self._progress(campaign, counts.get(campaign_id, {}))

        return await self._db.read(ask)

    async def list(self, query: PageQuery) -> Sequence[Progress]:
        async def ask(connection: Connection) -> Sequence[Progress]:
            campaigns = await repository.list_campaigns(connection, query.before(), query.limit + 1)
            counts = await repository.count_emails(connection, [campaign.id for campaign in campaigns])
            return [self._progress(campaign, counts.get(campaign.id, {})) for campaign in campaigns]

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
            counts = (await repository.count_emails(tx, [campaign_id])).get(campaign_id, {})
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
            rows = [(email_id, user_id, f"<{email_id}@{self._message_domain}>") for email_id, user_id in emails]
            await repository.queue_emails(tx, campaign_id, Category.CAMPAIGN, rows)
            if len(users) == CHUNK:
                await self._outbox.add(tx, CampaignChunkQueued(campaign_id=campaign_id, last_user_id=users[-1]))
            else:
                await repository.set_prepared(tx, campaign_id)
