import asyncio
import base64
import json
import time
from typing import cast
from uuid import UUID

import aiohttp
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.auth import ALGORITHM, AUDIENCE, ISSUER, TYPE, JwksClient, Principal, Role, TokenVerifier, issue, parse_jwks
from shared.errors import Unauthenticated, Unavailable
from shared.ids import new_id
from shared.testing import FixedClock

KEY = Ed25519PrivateKey.generate()
CLOCK = FixedClock()
NOW = int(CLOCK.now().timestamp())


class Keys:
    def __init__(self) -> None:
        self.asked = 0

    async def public_key(self, key_id: str) -> Ed25519PublicKey | None:
        self.asked += 1
        return KEY.public_key() if key_id == "k1" else None


def principal(expires_in: int = 600) -> Principal:
    return Principal(new_id(), new_id(), Role.USER, NOW + expires_in)


def forged(claims: dict[str, object] | None = None, header: dict[str, object] | None = None) -> str:
    good: dict[str, object] = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": str(new_id()), "sid": str(new_id()), "role": "user",
        "iat": NOW, "exp": NOW + 600,
    }  # fmt: skip
    return jwt.encode({**good, **(claims or {})}, KEY, ALGORITHM, headers={"kid": "k1", "typ": TYPE, **(header or {})})


async def test_a_token_of_ours_tells_who_calls() -> None:
    who = principal()
    assert await TokenVerifier(Keys(), CLOCK).verify(issue(who, "k1", KEY, NOW)) == who


async def test_a_verified_token_is_not_verified_again_but_still_expires() -> None:
    keys, clock = Keys(), FixedClock()
    verifier, token = TokenVerifier(keys, clock), issue(principal(60), "k1", KEY, NOW)
    await verifier.verify(token)
    await verifier.verify(token)
    assert keys.asked == 1
    clock.move(61)
    with pytest.raises(Unauthenticated, match="expired"):
        await verifier.verify(token)


def hs256_with_the_public_key() -> str:
    # PyJWT refuses to make one, so by hand.
    def part(content: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    import hashlib
    import hmac

    head = f"{part({'alg': 'HS256', 'typ': TYPE, 'kid': 'k1'})}.{part({'sub': str(new_id()), 'exp': NOW + 600})}"
    mac = hmac.new(KEY.public_key().public_bytes_raw(), head.encode(), hashlib.sha256).digest()
    return f"{head}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "a.b.c",
        "x" * 5000,
        forged({"exp": NOW - 1}),
        forged({"aud": "else"}),
        forged({"iss": "else"}),
        forged({"sub": "no-uuid"}),
        forged({"role": "root"}),
        forged(header={"kid": "k2"}),
        forged(header={"typ": "JWT"}),
        forged()[:-4] + "AAAA",
        jwt.encode({"sub": str(new_id())}, "", "none", headers={"kid": "k1", "typ": TYPE}),
        hs256_with_the_public_key(),
        jwt.encode({"sub": "x"}, Ed25519PrivateKey.generate(), ALGORITHM, headers={"kid": "k1", "typ": TYPE}),
    ],
)
async def test_other_tokens_are_refused(token: str) -> None:
    with pytest.raises(Unauthenticated):
        await TokenVerifier(Keys(), CLOCK).verify(token)


async def test_key_hints_in_the_token_are_ignored() -> None:
    own = Ed25519PrivateKey.generate()
    x = base64.urlsafe_b64encode(own.public_key().public_bytes_raw()).decode().rstrip("=")
    token = jwt.encode(
        {"iss": ISSUER, "aud": AUDIENCE, "sub": str(UUID(int=1)), "sid": str(UUID(int=2)), "role": "admin",
         "iat": int(time.time()), "exp": NOW + 600},
        own,
        ALGORITHM,
        headers={"kid": "k1", "typ": TYPE, "jwk": {"kty": "OKP", "crv": "Ed25519", "x": x}, "jku": "http://127.0.0.1/"},
    )  # fmt: skip
    with pytest.raises(Unauthenticated):
        await TokenVerifier(Keys(), CLOCK).verify(token)


def test_only_ed25519_keys_are_taken_from_a_key_set() -> None:
    x = base64.urlsafe_b64encode(KEY.public_key().public_bytes_raw()).decode().rstrip("=")
    good = {"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": x}
    others = [{"kty": "oct", "kid": "b", "k": "AAAA"}, {"kty": "OKP", "crv": "X25519", "kid": "c", "x": x}]
    broken: list[dict[str, object]] = [good | {"kid": "d", "x": bad} for bad in ("", "AAAA", 7, None, "\u00fc")]
    document = {"keys": [*broken, good, *others], "issuer": "x"}
    assert list(parse_jwks(json.dumps(document).encode())) == ["a"]


@pytest.mark.parametrize(
    "document", [b"", b"{}", b"[]", b'{"keys": 1}', b'{"keys": [1]}', b"\xff", b'{"keys": "\xff"}']
)
def test_what_is_no_key_set_is_an_error_of_one_kind(document: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        parse_jwks(document)


class Hanging:
    """A client session to a server that takes the connection and then breaks it."""

    def __init__(self) -> None:
        self.calls = 0
        self.called = asyncio.Event()
        self.broken = asyncio.Event()

    def get(self, _url: str, **_options: object) -> "Hanging":
        return self

    async def __aenter__(self) -> None:
        self.calls += 1
        self.called.set()
        await self.broken.wait()
        raise aiohttp.ServerDisconnectedError

    async def __aexit__(self, *_error: object) -> None: ...


async def test_callers_who_wait_for_the_keys_share_one_try() -> None:
    users = Hanging()
    keys = JwksClient("http://users/", cast("aiohttp.ClientSession", users))
    waiting = [asyncio.create_task(keys.public_key("k1")) for _ in range(20)]
    await users.called.wait()
    users.broken.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert users.calls == 1
    with pytest.raises(Unavailable):  # and who comes later tries again
        await keys.public_key("k1")
    assert users.calls == 2


async def test_who_has_the_key_does_not_wait_for_newer_ones() -> None:
    users = Hanging()
    keys = JwksClient("http://users/", cast("aiohttp.ClientSession", users))
    keys._keys = {"k1": KEY.public_key()}  # fetched long ago
    assert await keys.public_key("k1") is keys._keys["k1"]
    await users.called.wait()
    assert [await keys.public_key("k1") for _ in range(20)] == [keys._keys["k1"]] * 20
    assert users.calls == 1
    users.broken.set()
    assert await keys.public_key("k2") is None


@pytest.mark.parametrize("token", ["\udcff", "a.b.c\udc80", "", "."])
async def test_what_is_no_text_is_no_token(token: str) -> None:
    with pytest.raises(Unauthenticated):
        await TokenVerifier(Keys(), CLOCK).verify(token)
