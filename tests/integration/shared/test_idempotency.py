import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from shared.database import Database
from shared.errors import Conflict
from shared.health import Health
from shared.idempotency import InProgress, KeyReused, Once, clean_up
from shared.ids import new_id
from shared.settings import DataSettings
from tests.integration.shared import things


class Made(msgspec.Struct, frozen=True):
    id: str


@pytest.fixture
async def db(data_settings: DataSettings, health: Health) -> AsyncIterator[Database]:
    async with Database.opened("things", data_settings, health) as opened:
        await things.create_table(opened)
        yield opened


async def make(db: Database, once: Once) -> Made:
    async with db.transaction() as tx:
        if (earlier := await once.find(tx, Made)) is not None:
            return earlier
        thing_id = new_id()
        await things.insert(tx, thing_id, str(thing_id))
        made = Made(str(thing_id))
        await once.keep(tx, made)
    return made


async def count(db: Database) -> int:
    async with db.transaction() as tx:
        return int(await tx.fetchval("SELECT count(*) FROM things"))


async def test_the_same_request_has_one_effect_and_one_answer(db: Database) -> None:
    once = Once("ann", "key", b"body")
    assert await make(db, once) == await make(db, once)
    assert await count(db) == 1


async def test_a_hundred_at_once_have_one_effect(db: Database) -> None:
    answers = await asyncio.gather(*(make(db, Once("ann", "key", b"body")) for _ in range(100)), return_exceptions=True)
    made = [answer for answer in answers if isinstance(answer, Made)]
    assert await count(db) == 1
    assert len(set(made)) == 1
    assert all(isinstance(a, Made | InProgress) for a in answers)
    print(f"100 parallel requests with one key: effects 1, answered {len(made)}, in progress {100 - len(made)}")


async def test_another_body_under_the_same_key_is_refused(db: Database) -> None:
    await make(db, Once("ann", "key", b"body"))
    with pytest.raises(KeyReused):
        await make(db, Once("ann", "key", b"other"))


async def test_an_answer_of_another_release_is_not_given_again_and_the_effect_not_repeated(db: Database) -> None:
    once = Once("ann", "key", b"body")
    await make(db, once)
    async with db.transaction() as tx:
        await tx.execute("UPDATE idempotency_keys SET result = $1", b'{"number": 1}')
    with pytest.raises(Conflict, match="done before"):
        await make(db, once)
    assert await count(db) == 1


async def test_keys_belong_to_who_sent_them(db: Database) -> None:
    assert await make(db, Once("ann", "key", b"body")) != await make(db, Once("bob", "key", b"body"))


async def test_a_failed_request_may_be_sent_again(db: Database) -> None:
    once = Once("ann", "key", b"body")
    with pytest.raises(RuntimeError):
        async with db.transaction() as tx:
            await once.find(tx, Made)
            await once.keep(tx, Made("x"))
            raise RuntimeError
    await make(db, once)
    assert await count(db) == 1


async def test_without_a_key_every_request_counts(db: Database) -> None:
    await make(db, Once("ann", None, b"body"))
    await make(db, Once("ann", None, b"body"))
    assert await count(db) == 2


async def test_keys_are_forgotten_after_a_day(db: Database) -> None:
    await make(db, Once("ann", "old", b"body"))
    await make(db, Once("ann", "new", b"body"))
    async with db.transaction() as tx:
        await tx.execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours' WHERE key = 'old'")
    assert await clean_up(db) == 1
