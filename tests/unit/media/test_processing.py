"""When an event's turn comes, and what that costs it."""

import asyncio
from typing import Any, cast
from uuid import UUID

import pytest

from services.media.consumed import MediaUploaded
from services.media.processing import Processing
from shared.consumer import Consumer, Delivery, On
from shared.events import Envelope

IN_NO_TIME = 0.0  # a handler's bound that is over as soon as it runs


def _uploaded(number: int) -> Envelope:
    media = UUID(int=number)
    event = MediaUploaded(media_id=media, owner_id=UUID(int=1), blob_id=media, content_type="image/png", bytes=1)
    return Envelope.wrap(event, "tests")


async def test_waiting_for_a_turn_is_not_the_handlers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[UUID] = []
    go_on = asyncio.Event()
    nothing = cast("Any", None)

    async def process(_self: Processing, delivery: Delivery[MediaUploaded]) -> None:
        if not served:
            with delivery.waiting():  # the first one holds the others up
                await go_on.wait()
        served.append(delivery.event.media_id)

    monkeypatch.setattr(Processing, "_process", process)
    processing = Processing(nothing, nothing, nothing, nothing, nothing, processes=0)
    consumer = Consumer("media", [On(MediaUploaded, processing.process)], nothing, (), IN_NO_TIME)
    handling = [asyncio.create_task(consumer.handle(_uploaded(number))) for number in range(3)]
    for _ in range(10):
        await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*handling)
    assert served == [UUID(int=number) for number in range(3)]


async def test_after_its_turn_the_handler_is_bounded_again() -> None:
    nothing = cast("Any", None)
    delivery = Delivery(nothing, _uploaded(1), "media.process", nothing, None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(IN_NO_TIME) as delivery.bound:
            with delivery.waiting():
                await asyncio.sleep(0)
            await asyncio.Event().wait()
