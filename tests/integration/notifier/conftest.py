"""A notifier on the real servers, with a schema of its own: its API over HTTP, its worker fed with events by hand."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import aiohttp
import msgspec
import pytest

from devstack.ports import free_port
from services.notifier import app
from services.notifier.consumed import MediaFailed, MediaProcessed, UserRegistered
from services.notifier.settings import Settings
from shared import http_client
from shared.bus import InlineBus
from shared.database import Database
from shared.events import Envelope, Event
from shared.health import Health
from shared.ids import new_id
from shared.listener import listening
from shared.runner import Process
from shared.settings import DataSettings
from shared.testing import eventually
from tests.backing import Backing
from tests.issuer import Issuer

Make = Callable[..., Awaitable["Node"]]


@dataclass
class Node:
    """One process with both roles of notifier."""

    settings: Settings
    bus: InlineBus
    base_url: str
    http: aiohttp.ClientSession
    issuer: Issuer
    stop: Callable[[], Awaitable[None]]
    replicated: Callable[[], Awaitable[None]]

    async def give(self, *events: Event) -> list[Envelope]:
        """Deliver the events as the bus would; returns the envelopes, to give them again."""
        envelopes = [Envelope.wrap(event, "tests") for event in events]
        await self.give_again(envelopes)
        return envelopes

    async def give_again(self, envelopes: list[Envelope]) -> None:
        assert await self.bus.publish([envelope.to_message() for envelope in envelopes]) == [None] * len(envelopes)

    async def call(self, method: str, path: str, user_id: UUID, **kwargs: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.issuer.token(user_id)}"}
        await self.replicated()  # reads may go to a replica, and what the worker wrote carries no token
        async with self.http.request(
            method, f"{self.base_url}/api/v1/notifications{path}", headers=headers, **kwargs
        ) as r:
            body = await r.read()
            return r.status, msgspec.json.decode(body) if body else None

    @asynccontextmanager
    async def stream(
        self, user_id: UUID, last_event_id: int | None = None, token: str | None = None
    ) -> AsyncIterator["Stream"]:
        headers = {"Authorization": f"Bearer {token or self.issuer.token(user_id)}"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = str(last_event_id)
        url = f"{self.base_url}/api/v1/notifications/stream"
        async with self.http.get(url, headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            assert response.headers["X-Accel-Buffering"] == "no"
            yield Stream(response)


@dataclass
class Stream:
    response: aiohttp.ClientResponse
    comments: int = 0
    preamble: dict[str, str] = field(default_factory=dict)

    async def next(self) -> dict[str, Any] | None:
        """The next event with its data decoded; `None` when the stream has ended."""
        found: dict[str, Any] = {}
        while line := (await self.response.content.readline()).decode():
            match line.rstrip("\n").partition(":"):
                case ("", "", ""):
                    if "data" in found:
                        return found | {"id": int(found["id"]), "data": msgspec.json.decode(found["data"])}
                    self.preamble |= found
                    found = {}
                case ("", ":", _):
                    self.comments += 1
                case (name, _, value):
                    found[name] = value.removeprefix(" ")
        return None

    async def take(self, count: int) -> list[dict[str, Any]]:
        events = [await self.next() for _ in range(count)]
        return [event for event in events if event is not None]


class Sink:
    """The mail server's view of what came."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self._url = url
        self._http = http

    async def to(self, address: str) -> list[dict[str, Any]]:
        async with self._http.get(f"{self._url}/messages", params={"to": address}) as response:
            found: list[dict[str, Any]] = await response.json()
            return found

    async def one_to(self, address: str) -> dict[str, Any]:
        return (await eventually(lambda: self.to(address)))[0]

    async def fail(self, **faults: object) -> None:
        async with self._http.put(f"{self._url}/faults", json=faults) as response:
            response.raise_for_status()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with http_client.session() as session:
        yield session


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with Issuer().serving() as serving:
        yield serving


@pytest.fixture
def settings(data_settings: DataSettings, backing: Backing, issuer: Issuer) -> Settings:
    """Quick where the defaults are patient."""
    return Settings(
        **msgspec.structs.asdict(data_settings)
        | {"bus": "inline", "port": 0},
        jwks_url=issuer.url,
        smtp_url=backing.smtp,
        mail_from="Tenfold <no-reply@tenfold.test>",
        link_secret="l" * 32,
        email_first_retry_seconds=0.05,
        email_poll_seconds=0.1,
    )  # fmt: skip


@pytest.fixture
async def make(
    settings: Settings, backing: Backing, http: aiohttp.ClientSession, issuer: Issuer
) -> AsyncIterator[Make]:
    """Start a node; further ones share its schema. Arguments replace settings."""
    await backing.replicated()
    stack = AsyncExitStack()

    async def start(**changes: object) -> Node:
        own = msgspec.structs.replace(settings, **changes)
        resources = await stack.enter_async_context(AsyncExitStack())
        process = Process(resources, http)
        application = await app.api(process, own)
        await app.worker(process, own)
        process.deliver()
        port = free_port()
        await resources.enter_async_context(listening(application, own, port))
        bus = await process.bus(own)
        assert isinstance(bus, InlineBus)
        return Node(own, bus, f"http://127.0.0.1:{port}", http, issuer, resources.aclose, backing.replicated)

    async with stack:
        yield start


@pytest.fixture
async def node(make: Make) -> "Node":
    return await make()


@pytest.fixture
async def db(settings: Settings, health: Health) -> AsyncIterator[Database]:
    async with Database.opened("notifier", settings, health) as opened:
        yield opened


@pytest.fixture
async def sink(backing: Backing, http: aiohttp.ClientSession) -> AsyncIterator[Sink]:
    opened = Sink(backing.mail, http)
    yield opened
    await opened.fail()


@dataclass(frozen=True)
class Person:
    """Somebody whom no other test knows."""

    id: UUID = field(default_factory=new_id)
    locale: str = "en"
    name: str = "Ada"

    @property
    def address(self) -> str:
        return f"{self.id.hex}@example.com"

    def registered(self) -> UserRegistered:
        return UserRegistered(
            user_id=self.id, email=self.address, display_name=self.name, locale=self.locale, version=1
        )

    def processed(self, title: str = "Sunset") -> MediaProcessed:
        return MediaProcessed(media_id=new_id(), owner_id=self.id, title=title)

    def failed(self, title: str = "Sunset", reason: str = "the file is damaged") -> MediaFailed:
        return MediaFailed(media_id=new_id(), owner_id=self.id, title=title, reason=reason)


@pytest.fixture
def person() -> Person:
    return Person()
