"""Delivery in this process, while the relay holds the row: what was not handled or parked stays in the outbox."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.consumer import Consumer
from shared.errors import Unavailable
from shared.events import Envelope, Message, in_order_of_key

_STOP_SECONDS = 10.0


class InlineBus:
    """Delivers in this process. `open_for_delivery` is called once every consumer is registered."""

    batch = 8  # a handler may take seconds

    def __init__(self) -> None:
        self._consumers: list[Consumer] = []
        self._open = asyncio.Event()

    @asynccontextmanager
    async def consuming(self, consumer: Consumer, _concurrency: int) -> AsyncIterator[None]:
        self._consumers.append(consumer)
        try:
            async with consumer.retrying(self._open, _STOP_SECONDS):
                yield
        finally:
            self._consumers.remove(consumer)

    def open_for_delivery(self) -> None:
        self._open.set()

    def close_for_delivery(self) -> None:
        """From here on events stay in the outbox: their consumers are about to go."""
        self._open.clear()

    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        outcomes: list[Exception | None] = [Unavailable("waits for an earlier event")] * len(messages)
        if not self._open.is_set():
            raise Unavailable("not delivering")
        lanes = in_order_of_key(messages).values()
        await asyncio.gather(*(self._deliver_lane(messages, lane, outcomes) for lane in lanes))
        return outcomes

    async def _deliver_lane(self, messages: list[Message], lane: list[int], outcomes: list[Exception | None]) -> None:
        for position in lane:
            try:
                envelope = Envelope.from_message(messages[position])
                for consumer in self._consumers:
                    await consumer.handle(envelope)
                if not self._open.is_set():  # a consumer may have left before it had the event
                    raise Unavailable("not delivering")
            except Exception as error:  # noqa: BLE001 - the outcome is handed to the relay, which keeps the row
                outcomes[position] = error
                return
            outcomes[position] = None
