"""What the environment says to users."""

from typing import Annotated

import msgspec

from shared.settings import Count, DataSettings, Seconds, Secret


class Settings(DataSettings, frozen=True, kw_only=True):
    signing_key_secret: Secret  # encrypts the private signing keys in the database
    signing_key_rotation_seconds: Count = 30 * 24 * 3600
    # A new key is published for so long before it signs, longer than verifiers and instances keep the old set.
    signing_key_lead_seconds: Seconds = 900
    link_secret: Secret  # seals the tokens of emailed links in events; notifier has the same
    access_token_seconds: Count = 600
    refresh_token_seconds: Count = 30 * 24 * 3600
    argon2_memory_kib: Annotated[int, msgspec.Meta(ge=8192)] = 19 * 1024
    argon2_time: Count = 2
    argon2_threads: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    # Attempts to log in with wrong credentials that are free; each further one waits twice as long as the one before.
    login_free_attempts: Count = 10
    login_free_attempts_by_address: Count = 50  # an office may be behind one address
    login_longest_delay_seconds: Count = 60
    port: int = 8001
