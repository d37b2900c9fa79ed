"""The pool's turns and slots, without a server."""

import asyncio

import pytest

from shared.database.pool import Pool


class Connection:
    def is_closed(self) -> bool:
        return False

    def is_in_transaction(self) -> bool:
        return False

    async def close(self, timeout: float) -> None:
        pass

    def terminate(self) -> None:
        pass


class Server:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.fault: Exception | None = None
        self.answers = asyncio.Event()

    async def connect(self) -> Connection:
        self.asked += 1
        await self.answers.wait()
        if self.fault is not None:
            raise self.fault
        return Connection()


async def begun(pool: Pool) -> "asyncio.Task[object]":
    """A caller that waits for its connection."""
    caller: asyncio.Task[object] = asyncio.create_task(pool.acquire())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not caller.done()
    return caller


async def gone(caller: "asyncio.Task[object]") -> None:
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_who_comes_next_gets_the_connection_that_was_being_opened() -> None:
    server = Server()
    pool = Pool(server.connect, 1)
    await gone(await begun(pool))
    second = await begun(pool)

    server.answers.set()
    await second

    assert (server.asked, pool.in_use, pool.size) == (1, 1, 1)


async def test_a_slot_whose_opening_failed_for_nobody_is_free_again() -> None:
    server = Server()
    pool = Pool(server.connect, 1)
    await gone(await begun(pool))
    server.fault = OSError("refused")
    second = await begun(pool)

    server.answers.set()
    with pytest.raises(OSError, match="refused"):
        await second

    assert (server.asked, pool.in_use, pool.size) == (2, 0, 0)
    server.fault = None
    await pool.acquire()
    assert (pool.in_use, pool.size) == (1, 1)


async def test_closing_cuts_off_what_is_being_opened() -> None:
    server = Server()
    pool = Pool(server.connect, 2)
    await gone(await begun(pool))

    await pool.close(0.01)

    assert (pool.in_use, pool.size) == (0, 0)
    server.answers.set()
    with pytest.raises(Exception, match="closed"):
        await pool.acquire()
