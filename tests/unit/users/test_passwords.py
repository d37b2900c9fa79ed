import asyncio
import os
import threading
from collections.abc import AsyncIterator

import msgspec
import pytest

from services.users.passwords import Passwords, is_common
from services.users.settings import Settings
from shared.errors import Unavailable

SETTINGS = Settings(
    database_url="", signing_key_secret="s" * 32, link_secret="l" * 32, argon2_memory_kib=8192, argon2_time=1
)


@pytest.fixture
async def passwords() -> AsyncIterator[Passwords]:
    async with Passwords.opened(SETTINGS) as opened:
        yield opened


async def test_only_the_password_of_the_hash_is_good(passwords: Passwords) -> None:
    stored = await passwords.hash("correct horse")
    assert stored.startswith("$argon2id$v=19$m=8192,t=1,p=1$")
    assert await passwords.verify(stored, "correct horse")
    assert not await passwords.verify(stored, "correct horsf")
    assert not await passwords.verify(None, "correct horse")


async def test_a_hash_of_other_parameters_is_outdated(passwords: Passwords) -> None:
    stored = await passwords.hash("correct horse")
    assert not passwords.is_outdated(stored)
    async with Passwords.opened(msgspec.structs.replace(SETTINGS, argon2_time=2)) as dearer:
        assert dearer.is_outdated(stored)
        assert await dearer.verify(stored, "correct horse")


async def test_works_in_two_threads_that_give_way_to_the_loop(passwords: Passwords) -> None:
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def niceness() -> tuple[int, int]:
        number = threading.get_native_id()
        return number, os.getpriority(os.PRIO_PROCESS, number)

    seen = await asyncio.gather(*(passwords._run(niceness) for _ in range(50)))
    assert len({number for number, _ in seen}) <= 2
    assert {nice for _, nice in seen} == {10}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == here


async def test_more_than_can_be_done_soon_is_refused(passwords: Passwords) -> None:
    go = threading.Event()
    waiting = [asyncio.ensure_future(passwords._run(go.wait)) for _ in range(200)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await passwords.hash("correct horse")
    go.set()
    assert all(await asyncio.gather(*waiting))


@pytest.mark.parametrize(("password", "common"), [("password1", True), ("PassWord1", True), ("gk3-Vo9_qqzx", False)])
def test_the_commonest_are_known(password: str, common: bool) -> None:
    assert is_common(password) is common
