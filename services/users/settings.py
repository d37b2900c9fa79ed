"""What the environment says to users."""

from typing import Annotated

import msgspec

from shared.settings import Count, DataSettings, Secret


class Settings(DataSettings, frozen=True, kw_only=True):
    signing_key_secret: Secret  # encrypts the private signing keys in the database
    access_token_seconds: Count = 600
    refresh_token_seconds: Count = 30 * 24 * 3600
    argon2_memory_kib: Annotated[int, msgspec.Meta(ge=8192)] = 19 * 1024
    argon2_time: Count = 2
    argon2_threads: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    port: int = 8001
