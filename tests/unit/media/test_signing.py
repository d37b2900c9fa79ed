"""Signed URLs."""

from urllib.parse import parse_qs, urlsplit

from services.media.signing import UrlSigner
from shared.testing import FixedClock

PATH = "/api/v1/media/1/variants/small"


def _parts(url: str) -> tuple[str, str]:
    query = parse_qs(urlsplit(url).query)
    return query["expires"][0], query["signature"][0]


def test_holds_until_it_expires_and_at_least_half_of_its_time() -> None:
    clock = FixedClock()
    signer = UrlSigner("s" * 32, 3600, clock)
    expires, signature = _parts(signer.sign(PATH))
    left = signer.seconds_left(PATH, expires, signature)
    assert left is not None
    assert 1800 <= left <= 3600
    clock.move(left - 1)
    assert signer.seconds_left(PATH, expires, signature) == 1
    clock.move(1)
    assert signer.seconds_left(PATH, expires, signature) == 0


def test_is_the_same_for_a_while() -> None:
    clock = FixedClock()
    signer = UrlSigner("s" * 32, 3600, clock)
    first = signer.sign(PATH)
    clock.move(60)
    assert signer.sign(PATH) == first
    clock.move(1800)
    assert signer.sign(PATH) != first


def test_covers_path_expiry_and_secret() -> None:
    clock = FixedClock()
    signer = UrlSigner("s" * 32, 3600, clock)
    expires, signature = _parts(signer.sign(PATH))
    assert signer.seconds_left(PATH.replace("small", "large"), expires, signature) is None
    assert signer.seconds_left(PATH, str(int(expires) + 1), signature) is None
    assert signer.seconds_left(PATH, expires, "0" * 64) is None
    assert signer.seconds_left(PATH, expires, "é") is None
    assert UrlSigner("t" * 32, 3600, clock).seconds_left(PATH, expires, signature) is None
