import asyncio
from typing import Any

import msgspec

from services.media.settings import Settings
from shared.ids import new_id
from tests.integration.media import images
from tests.integration.media.conftest import Keys, World, running


async def at_once(world: World, count: int, **headers: str) -> list[tuple[int, Any, Any]]:
    photo = images.photo(64, 48)
    return await asyncio.gather(*(world.upload(photo, **headers) for _ in range(count)))


async def owned(world: World) -> int:
    return int((await world.call("GET", "/api/v1/media/usage"))[1]["items"])


async def test_a_hundred_parallel_uploads_with_one_key_have_one_effect(world: World) -> None:
    """Without a key each of them counts, so nothing but the key makes them one."""
    answers = await at_once(world, 100, **{"Idempotency-Key": str(new_id())})
    made = [media for status, media, _ in answers if status == 202]
    refused = [
        (status, problem["type"], headers["Retry-After"]) for status, problem, headers in answers if status != 202
    ]
    assert len({media["id"] for media in made}) == 1
    assert set(refused) <= {(409, "urn:tenfold:error:idempotency-in-progress", "1")}
    effects = await owned(world)
    assert effects == 1
    await at_once(world, 5)
    without = await owned(world) - effects
    assert without == 5
    print(f"100 parallel POST /media with one key: effects {effects}, answered {len(made)}, 409 {len(refused)}")
    print(f"5 without a key: effects {without}")


async def test_the_upload_that_filled_the_quota_may_be_sent_again(media_settings: Settings, keys: Keys) -> None:
    async with running(msgspec.structs.replace(media_settings, quota_items=1), keys) as world:
        key = {"Idempotency-Key": str(new_id())}
        first = await world.upload(images.photo(64, 48), **key)
        again = await world.upload(images.photo(64, 48), **key)
        other = await world.upload(images.photo(64, 48))
        assert (first[0], again[0], other[0]) == (202, 202, 409)
        assert first[1] == again[1]


async def test_a_key_is_its_owner_s(world: World) -> None:
    key = {"Idempotency-Key": str(new_id())}
    mine = await world.upload(images.photo(64, 48), **key)
    world.user_id = new_id()
    theirs = await world.upload(images.photo(64, 48), **key)
    assert (mine[0], theirs[0]) == (202, 202)
    assert mine[1]["owner_id"] != theirs[1]["owner_id"]
