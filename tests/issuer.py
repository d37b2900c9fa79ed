"""Stands in for users where tokens are concerned: signs them, and serves the public key."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import jwt
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.auth import Principal, Role, issue
from shared.ids import new_id


class Issuer:
    """`url` is the key set's, while it is served."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.url = ""

    def token(self, user_id: UUID, seconds: float = 600, role: Role = Role.USER) -> str:
        now = time.time()
        return issue(Principal(user_id, new_id(), role, int(now + seconds)), "test", self._key, int(now))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Issuer"]:
        jwk = jwt.algorithms.OKPAlgorithm.to_jwk(self._key.public_key(), as_dict=True)

        async def answer(_request: web.Request) -> web.Response:
            return web.json_response({"keys": [{**jwk, "kid": "test", "alg": "EdDSA", "use": "sig"}]})

        application = web.Application()
        application.router.add_get("/jwks.json", answer)
        async with TestServer(application) as server:
            self.url = str(server.make_url("/jwks.json"))
            yield self
