import pytest

from shared.errors import RateLimited, Unavailable


@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (0.2, "1"), (1.0, "1"), (1.4, "2"), (59.01, "60")])
def test_who_waits_as_long_as_told_is_not_too_early(seconds: float, header: str) -> None:
    for error in (RateLimited(seconds), Unavailable(retry_after=seconds)):
        assert error.headers["Retry-After"] == header
