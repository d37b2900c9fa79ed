from services.gateway.answers import Common
from services.gateway.cors import Cors
from services.gateway.headers import Seen

PAGE = "https://app.example.com"


def names(common: Common, *, seen: int = 0, scheme: str = "http", origin: str | None = None) -> list[str]:
    lines = common.lines(seen, "id", scheme, origin).decode().splitlines()
    assert lines[0] == "X-Request-Id: id"
    return [line.partition(":")[0] for line in lines[1:]]


def test_a_service_keeps_the_policies_it_gives_itself() -> None:
    common = Common(Cors(()))
    ours = ["X-Content-Type-Options", "Content-Security-Policy", "Referrer-Policy"]
    for _ in range(2):
        assert names(common, seen=Seen.DATE) == ours
        assert names(common, seen=Seen.DATE | Seen.REFERRER_POLICY) == ours[:2]
        assert names(common, scheme="https") == [*ours, "Strict-Transport-Security"]


def test_known_origins_are_told_so_and_all_others_nothing_of_them() -> None:
    common = Common(Cors([PAGE]))
    for _ in range(2):
        assert f"Access-Control-Allow-Origin: {PAGE}\r\n".encode() in common.lines(0, "id", "http", PAGE)
        for other in ("https://evil.example", None):
            assert names(common, origin=other)[-1] == "Vary"
    assert "Vary" not in names(Common(Cors(())), origin=PAGE)
