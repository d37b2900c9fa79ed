"""The topic table."""

from typing import Any

from services.notifier.campaigns import Preparation
from services.notifier.consumed import (
    MediaFailed,
    MediaProcessed,
    UserDeleted,
    UserPasswordChanged,
    UserPasswordResetRequested,
    UserRegistered,
    UserUpdated,
    UserVerificationRequested,
)
from services.notifier.events import CampaignChunkQueued, CampaignCreated
from services.notifier.service import Notifier
from shared.consumer import On


def consumers(notifier: Notifier, preparation: Preparation) -> list[On[Any]]:
    return [
        On(UserRegistered, notifier.welcome),
        On(UserUpdated, notifier.keep_recipient),
        On(UserVerificationRequested, notifier.send_verification),
        On(UserPasswordResetRequested, notifier.send_password_reset),
        On(UserPasswordChanged, notifier.tell_password_changed),
        On(UserDeleted, notifier.forget),
        On(MediaProcessed, notifier.tell_media_ready),
        On(MediaFailed, notifier.tell_media_failed),
        On(CampaignCreated, preparation.begin),
        On(CampaignChunkQueued, preparation.go_on),
    ]
