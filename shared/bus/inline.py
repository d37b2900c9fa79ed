"""Delivery in this process, while the relay holds the row: what was not handled or parked stays in the outbox."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.consumer import Consumer
from shared.errors import Unavailable
from shared.events import Envelope, in_order_of_key

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

    async def publish(self, envelopes: list[Envelope]) -> list[Exception | None]:
        outcomes: list[Exception | None] = [Unavailable("waits for an earlier event")] * len(envelopes)
        if not self._open.is_set():
            raise Unavailable("not delivering")
        lanes = in_order_of_key(envelopes).values()
        await asyncio.gather(*(self._deliver_lane(envelopes, lane, outcomes) for lane in lanes))
        return outcomes

    async def _deliver_lane(self, envelopes: list[Envelope], lane: list[int], outcomes: list[Exception | None]) -> None:
        for position in lane:
            try:
                for consumer in self._consumers:
                    await consumer.handle(envelopes[position])
            except Exception as error:  # noqa: BLE001 - the outcome is handed to the relay, which keeps the row
                outcomes[position] = error
                return
            outcomes[position] = None
