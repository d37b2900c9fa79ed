import pytest

from shared.errors import DeadlineExceeded
from shared.http_client import deadline, remaining


def test_without_a_deadline_the_default_is_left() -> None:
    assert remaining(otherwise=7) == 7


def test_an_inner_deadline_never_reaches_past_the_outer() -> None:
    with deadline(1), deadline(100):
        assert 0 < remaining(otherwise=50) <= 1
    assert remaining(otherwise=50) == 50


def test_work_past_its_deadline_is_not_started() -> None:
    with deadline(0), pytest.raises(DeadlineExceeded):
        remaining(otherwise=50)
