"""Signed URLs: who has one may see the image until it expires, without a token."""

import hashlib
import hmac
from urllib.parse import urlencode

from shared.clock import Clock


class UrlSigner:
    def __init__(self, secret: str, seconds: int, clock: Clock) -> None:
        self._key = secret.encode()
        self._seconds = seconds
        self._clock = clock

    def sign(self, path: str) -> str:
        """`path` with `expires` and `signature`. It is the same for a while, so that browsers' caches hit."""
        half = self._seconds // 2
        return self.sign_until(path, (int(self._clock.now().timestamp()) // half + 2) * half)

    def sign_until(self, path: str, expires: int) -> str:
        """`path` with a signature that holds until `expires`, in seconds since the epoch."""
        return f"{path}?{urlencode({'expires': expires, 'signature': self._signature(path, str(expires))})}"

    def seconds_left(self, path: str, expires: str, signature: str) -> int | None:
        """How long the signature holds from now, 0 when it has expired; `None` when it is not ours."""
        if not hmac.compare_digest(self._signature(path, expires).encode(), signature.encode()):
            return None
        return max(0, int(expires) - int(self._clock.now().timestamp()))

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()
