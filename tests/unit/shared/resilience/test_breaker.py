from shared.resilience import CircuitBreaker
from shared.testing import Ticks


def opened(ticks: Ticks) -> CircuitBreaker:
    breaker = CircuitBreaker(ticks)
    for _ in range(10):
        assert breaker.passes()
        breaker.failed()
    return breaker


def test_it_opens_when_half_of_the_requests_fail() -> None:
    breaker = CircuitBreaker(Ticks())
    for _ in range(9):
        breaker.failed()
        breaker.succeeded()
    assert breaker.passes()
    breaker.failed()
    assert not breaker.passes()
    assert 0.8 <= breaker.retry_after() <= 1.2


def test_failures_among_many_answers_do_not_open_it() -> None:
    breaker = CircuitBreaker(Ticks())
    for _ in range(100):
        breaker.failed()
        breaker.succeeded()
        breaker.succeeded()
    assert not breaker.is_open


def test_failures_far_apart_do_not_open_it() -> None:
    ticks = Ticks()
    breaker = CircuitBreaker(ticks)
    for _ in range(50):
        breaker.failed()
        ticks.move(2)
    assert not breaker.is_open


def test_after_a_while_one_request_passes_and_its_answer_closes_it() -> None:
    ticks = Ticks()
    breaker = opened(ticks)
    ticks.move(1.3)
    assert breaker.passes()
    assert not breaker.passes()
    breaker.succeeded()
    assert all(breaker.passes() for _ in range(10))


def test_a_probe_that_fails_opens_it_for_longer_up_to_a_bound() -> None:
    ticks = Ticks()
    breaker = opened(ticks)
    waits = []
    for _ in range(8):
        ticks.move(breaker.retry_after() + 0.001)
        assert breaker.passes()
        breaker.failed()
        waits.append(breaker.retry_after())
    assert waits[0] < waits[2]
    assert waits[-1] <= 5 * 1.2


def test_a_probe_without_an_outcome_is_followed_by_another() -> None:
    ticks = Ticks()
    breaker = opened(ticks)
    ticks.move(1.3)
    assert breaker.passes()
    ticks.move(1.1)
    assert breaker.passes()


def test_requests_from_before_it_opened_tell_nothing_new() -> None:
    breaker = opened(Ticks())
    for _ in range(50):
        breaker.failed()
    assert breaker.retry_after() <= 1.2
