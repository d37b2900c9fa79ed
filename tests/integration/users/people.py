"""People who use the service, and a spy on the events that tell others of them."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from services.users.app import SERVICE
from services.users.events import PRODUCES
from services.users.settings import Settings
from shared.consumer import Consumer, Delivery, On
from shared.database import Database
from shared.events import Event
from shared.health import Health
from shared.runner import Process, Service
from shared.sealing import link_cipher
from shared.testing import eventually
from tests.serving import Answer, Api

PASSWORD = "correct horse battery"  # not a secret: a test's
ANN = {"email": "Ann@Example.org", "password": PASSWORD, "display_name": "Ann"}


async def register(api: Api, name: str = "ann") -> Answer:
    return await api.post("/api/v1/users", {**ANN, "email": f"{name}@example.org"})


async def log_in(api: Api, name: str = "ann", password: str = PASSWORD) -> Answer:
    return await api.post("/api/v1/sessions", {"email": f"{name}@example.org", "password": password})


async def token(api: Api, name: str = "ann") -> str:
    await register(api, name)
    access: str = (await log_in(api, name)).body["access_token"]
    return access


async def done_or_waiting(request: "asyncio.Future[Any]", sql: Any) -> None:
    """Until the request is answered, or waits for a lock that `sql` holds."""

    async def found() -> bool:
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        return request.done() or bool(await sql.fetchval(waiting))

    await eventually(found)


@dataclass
class Spy:
    """Sees the events as the other services do."""

    settings: Settings
    events: list[Event] = field(default_factory=list)

    async def see(self, delivery: Delivery[Event]) -> None:
        self.events.append(delivery.event)

    @property
    def service(self) -> Service[Settings]:
        async def api(process: Process, settings: Settings) -> web.Application:
            bus = await process.bus(settings)
            db = await process.enter(Database.opened("users", settings, Health()))
            consumer = Consumer(
                "spy", [On(event, self.see) for event in PRODUCES], db, settings.event_retry_delays_seconds
            )
            await process.enter(bus.consuming(consumer, 1))
            return await SERVICE.api(process, settings)

        return Service(SERVICE.name, Settings, api, migrations=SERVICE.migrations)

    async def next(self, kind: type[Event], *, after: int = 0) -> Event:
        """The first event of that kind, after so many others of it."""

        async def found() -> Event | None:
            those = [event for event in self.events if isinstance(event, kind)]
            return those[after] if len(those) > after else None

        event = await eventually(found)
        assert event is not None
        return event

    async def token(self, kind: type[Event], *, after: int = 0) -> str:
        """What stands in the link that such an event has sent by email."""
        event = await self.next(kind, after=after)
        sealed: str = event.link.sealed_token  # type: ignore[attr-defined]
        return link_cipher(self.settings.link_secret).decrypt(sealed).decode()
