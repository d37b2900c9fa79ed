"""A time-out that is set again and again."""

import asyncio
import time

import pytest

from shared.alarm import Alarm


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def never() -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def alarm() -> Alarm:
    return Alarm(asyncio.get_running_loop())


async def test_what_takes_too_long_is_cancelled_and_the_task_lives_on(alarm: Alarm) -> None:
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await alarm.within(0.01, never())
        assert cancelling() == 0


async def test_what_ends_in_time_is_left_alone_and_the_next_has_its_own_time(alarm: Alarm) -> None:
    assert await alarm.within(30, asyncio.sleep(0, "first")) == "first"
    with pytest.raises(TimeoutError):  # though a timer for later runs
        await alarm.within(0.01, never())
    assert await alarm.within(30, asyncio.sleep(0, "third")) == "third"


async def test_a_cancellation_by_another_stays_one(alarm: Alarm) -> None:
    task = asyncio.create_task(alarm.within(30, never()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_of_two_cancellations_only_its_own_is_undone(alarm: Alarm) -> None:
    async def cancelled_as_well() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            raise

    task = asyncio.create_task(alarm.within(0.01, cancelled_as_well()))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_outer_timeout_is_told_from_it(alarm: Alarm) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await alarm.within(30, never())
    assert cancelling() == 0


async def test_another_error_at_that_moment_leaves_no_cancellation_behind(alarm: Alarm) -> None:
    async def lost() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            raise ConnectionError("lost") from None

    with pytest.raises(ConnectionError):
        await alarm.within(0.01, lost())
    assert cancelling() == 0


async def test_a_cancellation_in_the_very_turn_in_which_it_rings_is_not_lost(alarm: Alarm) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(alarm.within(0.01, never()))
    await asyncio.sleep(0)
    loop.call_at(loop.time() + 0.009, task.cancel)
    time.sleep(0.02)  # noqa: ASYNC251 - so that both are due in one turn
    with pytest.raises(asyncio.CancelledError):
        await task
