"""What notifier publishes, for itself: campaigns are prepared in steps that each follow from the one before."""

from typing import ClassVar
from uuid import UUID

from shared.events import Event

TOPIC = "notifier.events"


class CampaignCreated(Event, frozen=True, kw_only=True):
    TYPE: ClassVar = "campaign.created.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "campaign_id"

    campaign_id: UUID


class CampaignChunkQueued(Event, frozen=True, kw_only=True):
    """The recipients up to and with this one have their email in the queue."""

    TYPE: ClassVar = "campaign.chunk_queued.v1"
    TOPIC: ClassVar = TOPIC
    KEY: ClassVar = "campaign_id"

    campaign_id: UUID
    last_user_id: UUID


PRODUCES: tuple[type[Event], ...] = (CampaignCreated, CampaignChunkQueued)
