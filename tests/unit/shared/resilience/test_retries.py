from shared.resilience import RetryBudget
from shared.testing import Ticks


def test_a_few_at_once_and_a_few_a_second() -> None:
    ticks = Ticks()
    budget = RetryBudget(ticks)
    assert sum(budget.granted() for _ in range(100)) == 10
    ticks.move(1)
    assert sum(budget.granted() for _ in range(100)) == 3


def test_a_fifth_of_the_calls() -> None:
    budget = RetryBudget(Ticks())
    granted = 0
    for _ in range(1000):
        budget.called()
        granted += budget.granted()
    assert 195 <= granted <= 215
