"""Processes to kill, freeze and restart: `python -m tests.chaos.programs KIND TOPIC GROUP`.

KIND is `relay`; `relay-deaf`, which kills itself each time the broker has acknowledged and before the rows are deleted;
`consumer`; or `consumer-batch`. They print `ready` when they work, stop at SIGTERM, and take their settings from the
environment as services do.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from shared.bus import KafkaBus
from shared.consumer import Consumer, Delivery, On
from shared.database import Database, Transaction
from shared.events import Message
from shared.health import Health
from shared.outbox import Relay
from shared.settings import DataSettings, load
from shared.testing import eventually
from tests.integration.shared import things
from tests.integration.shared.things import ThingMade


class DeafBus(KafkaBus):
    async def publish(self, messages: list[Message]) -> list[Exception | None]:
        await super().publish(messages)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


async def main(kind: str, topic: str, group: str) -> None:
    settings = load(DataSettings, "things")
    health = Health()
    health.started()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncExitStack() as stack:
        db = await stack.enter_async_context(Database.opened("things", settings, health))
        made = things.event_type(topic)

        async def note(delivery: Delivery[ThingMade]) -> None:
            async with delivery.transaction() as tx:
                await tx.execute(
                    "INSERT INTO effects (consumer, thing_id, number) VALUES ($1, $2, $3)",
                    group,
                    delivery.event.thing_id,
                    delivery.event.number,
                )

        async def note_all(tx: Transaction, events: Sequence[ThingMade]) -> None:
            await tx.execute(
                "INSERT INTO effects (consumer, thing_id, number) SELECT $1, * FROM unnest($2::uuid[], $3::int[])",
                group,
                [event.thing_id for event in events],
                [event.number for event in events],
            )

        on = On(made, note, batch=note_all if kind == "consumer-batch" else None)
        bus = await stack.enter_async_context((DeafBus if kind == "relay-deaf" else KafkaBus).opened(settings, health))
        consumes = kind.startswith("consumer")
        if consumes:
            await stack.enter_async_context(bus.consuming(Consumer(group, [on], db), 8))
            await eventually(lambda: _ready(health), within=60)
        print("ready", flush=True)
        if not consumes:
            await stack.enter_async_context(Relay.opened("things", db, bus))
        await stop.wait()


async def _ready(health: Health) -> bool:
    return not await health.faults()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
