from hypothesis import given
from hypothesis import strategies as st

from shared import consistency
from shared.consistency import Positions


def test_a_token_tells_each_cluster_s_position() -> None:
    positions = Positions()
    positions.advance("abc", 0x10)
    positions.advance("xyz", 0x20)
    positions.advance("abc", 0x05)
    again = Positions(positions.token())
    assert (again.get("abc"), again.get("xyz"), again.get("other")) == (0x10, 0x20, 0)


@given(st.text(max_size=200))
def test_whatever_a_caller_sends_is_read_without_an_error(token: str) -> None:
    positions = Positions(token)
    assert Positions(positions.token()).token() == positions.token()
    assert len(positions.token()) < 300


def test_outside_of_a_request_nothing_is_tracked() -> None:
    consistency.current().advance("abc", 1)
    assert consistency.current().get("abc") == 0
    assert not consistency.is_tracked()
    with consistency.tracked("abc-1") as positions:
        assert consistency.current() is positions
        assert not positions.written
