import pytest

from shared.database.primary import base36, hosts, parse_lsn


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("postgresql://u:p@a/db", ["postgresql://u:p@a/db"]),
        ("postgresql://a,b:5433/db?x=1", ["postgresql://a/db?x=1", "postgresql://b:5433/db?x=1"]),
        ("postgresql://u:p%40@a:1,[::1]:2/db", ["postgresql://u:p%40@a:1/db", "postgresql://u:p%40@[::1]:2/db"]),
    ],
)
def test_a_url_with_several_hosts_is_one_a_host(url: str, found: list[str]) -> None:
    assert hosts(url) == found


def test_positions_are_read_as_numbers() -> None:
    assert parse_lsn("16/B374D848") == 0x16B374D848
    assert base36(7_300_000_000_000_000_000).isalnum()
    assert len(base36(2**64 - 1)) == 13
