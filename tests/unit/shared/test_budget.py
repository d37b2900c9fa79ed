import pytest

from shared.budget import DoesNotFit, Plan


def test_it_fits_to_the_last_connection() -> None:
    plan = Plan(pools=8, surge=1, pool=10, max_connections=100, reserve=10)
    assert (plan.needed, plan.available, plan.fits) == (90, 90, True)
    plan.require()


def test_one_too_many_is_refused_with_the_arithmetic() -> None:
    plan = Plan(pools=9, surge=1, pool=10, max_connections=100, reserve=10)
    with pytest.raises(DoesNotFit, match=r"\(9 pools \+ 1 surge\) x 10 = 100 > max_connections 100 - reserve 10 = 90"):
        plan.require()
    assert plan.largest_pool == 9


@pytest.mark.parametrize(
    ("pools", "pool", "advice"),
    [(4, 5, "connect directly"), (20, 10, "DATABASE_POOL_MAX=4"), (200, 10, "PgBouncer")],
)
def test_the_advice_follows_from_the_arithmetic(pools: int, pool: int, advice: str) -> None:
    plan = Plan(pools=pools, pool=pool, max_connections=100)
    assert advice in " ".join(plan.advice(cores=2))
