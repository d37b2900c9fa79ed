from hypothesis import given
from hypothesis import strategies as st

from shared import consistency
from shared.consistency import ANY, Position, Positions


def test_a_token_tells_each_cluster_s_position() -> None:
    positions = Positions()
    positions.advance("abc", Position(1, 0x10))
    positions.advance("xyz", Position(3, 0x20))
    positions.advance("abc", Position(1, 0x05))
    again = Positions(positions.token())
    assert again.get("abc") == Position(1, 0x10)
    assert again.get("xyz") == Position(3, 0x20)
    assert again.get("other") == ANY


def test_a_write_after_a_promotion_is_later_than_any_before_it() -> None:
    positions = Positions("abc-1-ff")
    positions.advance("abc", Position(2, 0x80))
    assert positions.get("abc") == Position(2, 0x80)


def test_a_server_left_on_the_old_timeline_has_not_reached_a_write_on_the_new_one() -> None:
    written = Position(2, 0x80)
    assert not Position(1, 0xFF).reaches(written)
    assert not Position(2, 0x7F).reaches(written)
    assert Position(2, 0x80).reaches(written)
    assert Position(3, 0x80).reaches(written)
    assert Position(2, 0x80).reaches(Position(1, 0x70))
    assert Position(0, 0).reaches(ANY)


@given(st.text(max_size=200))
def test_whatever_a_caller_sends_is_read_without_an_error(token: str) -> None:
    positions = Positions(token)
    assert Positions(positions.token()).token() == positions.token()
    assert len(positions.token()) <= 256  # what the gateway takes in a cookie


def test_outside_of_a_request_nothing_is_tracked() -> None:
    consistency.current().advance("abc", Position(1, 1))
    assert consistency.current().get("abc") == ANY
    assert not consistency.is_tracked()
    with consistency.tracked("abc-1-1") as positions:
        assert consistency.current() is positions
        assert not positions.written
