"""Forged, foreign and expired access tokens, at users itself and through the gateway in front of it."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.gateway.app import SERVICE as GATEWAY
from services.gateway.settings import Settings as GatewaySettings
from services.users.settings import Settings
from shared.auth import ALGORITHM, AUDIENCE, ISSUER, TYPE
from shared.sealing import cipher
from tests.integration.users.people import log_in, register, token
from tests.serving import Api, serving


@dataclass
class Mint:
    """What our own tokens are made of, for others that are nearly so."""

    claims: dict[str, Any]
    kid: str
    key: Ed25519PrivateKey

    def token(
        self, key: Any = None, algorithm: str = ALGORITHM, header: dict[str, Any] | None = None, **claims: Any
    ) -> str:
        headers = {"kid": self.kid, "typ": TYPE, **(header or {})}
        return jwt.encode({**self.claims, **claims}, key or self.key, algorithm, headers=headers)


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def _none(mint: Mint) -> str:
    return f"{_part({'alg': 'none', 'typ': TYPE, 'kid': mint.kid})}.{_part(mint.claims)}."


def _hs256(mint: Mint) -> str:
    """Signed with the public key, as if it were a secret that both sides know."""
    head = f"{_part({'alg': 'HS256', 'typ': TYPE, 'kid': mint.kid})}.{_part(mint.claims)}"
    mac = hmac.new(mint.key.public_key().public_bytes_raw(), head.encode(), hashlib.sha256).digest()
    return f"{head}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def _own_key(mint: Mint) -> str:
    """With the forger's key, and where to find it."""
    own = Ed25519PrivateKey.generate()
    x = base64.urlsafe_b64encode(own.public_key().public_bytes_raw()).decode().rstrip("=")
    return mint.token(
        own, header={"jku": "http://127.0.0.1:1/", "jwk": {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": mint.kid}}
    )


FORGED: dict[str, Callable[[Mint], str]] = {
    "alg none": _none,
    "HS256 with the public key": _hs256,
    "jku and jwk": _own_key,
    "another key": lambda mint: mint.token(Ed25519PrivateKey.generate()),
    "an unknown kid": lambda mint: mint.token(header={"kid": "x"}),
    "expired": lambda mint: mint.token(exp=int(time.time()) - 1),
    "another audience": lambda mint: mint.token(aud="else"),
    "another issuer": lambda mint: mint.token(iss="else"),
    "another type": lambda mint: mint.token(header={"typ": "JWT"}),
    "a role that is none": lambda mint: mint.token(role="root"),
}


@pytest.fixture
async def gateway(api: Api, settings: Settings) -> AsyncIterator[Api]:
    own = GatewaySettings(
        jwks_url=f"{api.base}/.well-known/jwks.json",
        upstream=dict.fromkeys(("users", "media", "notifier"), (api.base,)),
        limit_credentials="6000/60",
        drain_seconds=0,
    )
    async with serving(GATEWAY, own) as opened:
        yield opened


async def test_only_our_own_tokens_are_good(api: Api, gateway: Api, settings: Settings, sql: Any) -> None:
    good = await token(api)
    claims = jwt.decode(good, options={"verify_signature": False})
    assert (claims["iss"], claims["aud"]) == (ISSUER, AUDIENCE)
    row = await sql.fetchrow("SELECT id, private_key FROM signing_keys")
    sealed = cipher(settings.signing_key_secret, "users signing keys").decrypt(row["private_key"])
    mint = Mint(claims, row["id"], Ed25519PrivateKey.from_private_bytes(sealed))
    for where in (api, gateway):
        assert (await where.get("/api/v1/users/me", token=mint.token())).status == 200  # the mint is the real one
        for name, forge in FORGED.items():
            answer = await where.get("/api/v1/users/me", token=forge(mint))
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), name


async def test_nobody_says_themselves_who_they_are(api: Api, gateway: Api) -> None:
    ann = (await register(api)).body["id"]
    bob = await token(api, "bob")
    forged = {"x_user_id": ann, "x_user_role": "admin", "x_forwarded_user": ann, "x_principal": ann}
    for where in (api, gateway):
        assert (await where.get("/api/v1/users/me", **forged)).status == 401
        assert (await where.get("/api/v1/users/me", token=bob, **forged)).body["email"] == "bob@example.org"
        assert (await where.get("/api/v1/admin/users", token=bob, **forged)).status == 403


async def test_fifty_refreshes_at_once_log_nobody_out(gateway: Api) -> None:
    """A client whose tabs all refresh at the same time: nobody is out, and it is one session still."""
    await register(gateway)
    first = (await log_in(gateway)).body["refresh_token"]
    path = "/api/v1/sessions/refresh"
    answers = await asyncio.gather(*(gateway.post(path, {"refresh_token": first}) for _ in range(50)))
    assert {answer.status for answer in answers} == {201}
    sessions = {UUID(jwt.decode(a.body["access_token"], options={"verify_signature": False})["sid"]) for a in answers}
    assert len(sessions) == 1
    access = answers[-1].body["access_token"]
    assert len((await gateway.get("/api/v1/sessions", token=access)).body["items"]) == 1
    following = [await gateway.post(path, {"refresh_token": answers[n].body["refresh_token"]}) for n in (0, 49)]
    assert [answer.status for answer in following] == [201, 201]
