"""The delays for who guesses, where each process counts for itself."""

import msgspec
import pytest

from services.users import throttle
from services.users.errors import TooManyAttempts
from services.users.models import Client
from services.users.settings import Settings
from services.users.throttle import Throttle

SETTINGS = Settings(
    database_url="",
    signing_key_secret="s" * 32,
    link_secret="l" * 32,
    login_free_attempts=2,
    login_longest_delay_seconds=5,
)


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throttle, "time", clock)
    return clock


async def wait(counts: Throttle, address: str = "10.0.0.1", *, familiar: bool = False) -> int:
    """The seconds that an attempt has to wait; 0 when it was let through."""
    try:
        await counts.begin("ann@example.org", Client("", address), familiar=familiar)
    except TooManyAttempts as error:
        return int(error.headers["Retry-After"])
    return 0


async def test_each_attempt_waits_twice_as_long_up_to_a_limit(clock: Clock) -> None:
    counts, waits = Throttle(None, SETTINGS), []
    for _ in range(7):
        assert await wait(counts) == 0
        if seconds := await wait(counts, "10.0.0.2"):
            waits.append(seconds)
            clock.now += seconds
    assert waits[:4] == [1, 2, 4, 5]
    assert set(waits[4:]) == {5}


async def test_who_is_logged_in_has_a_count_of_their_own(clock: Clock) -> None:
    counts = Throttle(None, SETTINGS)
    for n in range(4):
        await wait(counts, f"10.0.1.{n}")
    assert await wait(counts, "10.0.1.9") > 0
    assert await wait(counts, "10.0.0.1", familiar=True) == 0


async def test_a_good_attempt_gives_back_its_count(clock: Clock) -> None:
    counts = Throttle(None, msgspec.structs.replace(SETTINGS, login_free_attempts_by_address=2))
    for _ in range(10):
        attempt = await counts.begin("ann@example.org", Client("", "10.0.0.1"), familiar=False)
        await counts.succeeded(attempt)


async def test_one_network_of_ipv6_is_one_address(clock: Clock) -> None:
    counts = Throttle(None, msgspec.structs.replace(SETTINGS, login_free_attempts_by_address=2))
    found = []
    for n in range(4):
        try:
            await counts.begin(f"{n}@example.org", Client("", f"2001:db8::{n}"), familiar=False)
            found.append(True)
        except TooManyAttempts:
            found.append(False)
    assert found == [True, True, True, False]
