"""The topic table of media's worker."""

from typing import Any

from services.media.consumed import MediaDeleted, MediaUploaded, UserDeleted
from services.media.processing import Processing
from shared.consumer import On


def consumers(processing: Processing) -> list[On[Any]]:
    return [
        On(MediaUploaded, processing.process),
        On(MediaDeleted, processing.forget),
        On(UserDeleted, processing.forget_owner),
    ]
