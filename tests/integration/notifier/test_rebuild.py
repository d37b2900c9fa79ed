"""The projection of users, made again from their topic on a real broker."""

from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import msgspec
import pytest

from services.notifier import app
from services.notifier.consumed import UserDeleted, UserRegistered, UserUpdated
from services.notifier.settings import Settings
from shared.bus import KafkaBus
from shared.database import Database
from shared.events import Envelope, Event
from shared.health import Health
from shared.runner import Process
from tests.integration.notifier.conftest import Person


def updated(person: Person, version: int, **changes: str) -> UserUpdated:
    known = {"email": person.address, "display_name": "Ada", "locale": "en"}
    return UserUpdated(user_id=person.id, version=version, **known | changes)


async def publish(settings: Settings, *events: Event) -> None:
    async with KafkaBus.opened(settings, Health()) as bus:
        messages = [envelope.to_message() for envelope in Envelope.wrap_all(events, "users")]
        assert await bus.publish(messages) == [None] * len(events)


async def rebuild(settings: Settings, http: aiohttp.ClientSession) -> int:
    async with AsyncExitStack() as stack:
        return await app.SERVICE.commands["rebuild"].run(Process(stack, http), settings)


async def row(db: Database, person: Person) -> dict[str, Any] | None:
    async with db.transaction() as tx:
        found = await tx.fetchrow(
            "SELECT email, display_name, locale, source_version FROM recipients WHERE user_id = $1", person.id
        )
    return dict(found) if found else None


async def test_the_projection_comes_back_from_the_topic(
    settings: Settings, db: Database, http: aiohttp.ClientSession, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka = msgspec.structs.replace(settings, bus="kafka")
    lost, wrong, gone, newer = (Person() for _ in range(4))
    registered: list[UserRegistered] = [person.registered() for person in (lost, wrong, gone, newer)]
    await publish(
        kafka,
        *registered,
        updated(lost, 3, locale="de"),
        updated(wrong, 2),
        updated(newer, 2),
        UserDeleted(user_id=gone.id),
    )
    async with db.transaction() as tx:
        for person, version in ((wrong, 2), (gone, 1), (newer, 5)):
            await tx.execute(
                "INSERT INTO recipients (user_id, email, source_version) VALUES ($1, 'x@y.z', $2)", person.id, version
            )
    for _ in range(2):
        assert await rebuild(kafka, http) == 0
        assert await row(db, lost) == {
            "email": lost.address, "display_name": "Ada", "locale": "de", "source_version": 3,
        }  # fmt: skip
        assert (await row(db, wrong) or {})["email"] == wrong.address
        assert await row(db, gone) is None
        assert (await row(db, newer) or {})["email"] == "x@y.z"  # by an event that is not in the topic yet
    assert "events of users read" in capsys.readouterr().out
    async with db.transaction() as tx:
        assert await tx.fetchval("SELECT count(*) FROM emails") == 0


async def test_there_is_nothing_to_read_without_a_broker(
    settings: Settings, http: aiohttp.ClientSession, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await rebuild(settings, http) == 1
    assert "BUS=inline" in capsys.readouterr().err
