"""The errors that a caller may see, rendered in one place (`shared.middleware`) as RFC 9457 problem details.

    TenfoldError
    ├── Malformed            400  the bytes are not what their content type says
    ├── Unauthenticated      401
    ├── Forbidden            403
    ├── NotFound             404  absent, or not the caller's
    ├── Conflict             409
    ├── PreconditionFailed   412  stale `If-Match`
    ├── TooLarge             413
    ├── UnsupportedType      415
    ├── InvalidInput         422  names the fields
    ├── RateLimited          429  with `Retry-After`
    ├── Unavailable          503  overloaded or a part is down, with `Retry-After`
    └── DeadlineExceeded     504

A service names its own as subclasses in its `errors.py`. Anything else that is raised becomes a 500 that tells nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec


class FieldError(msgspec.Struct, frozen=True):
    """One invalid field. `pointer` is a JSON pointer (RFC 6901) into the body, or `?name` for a query parameter."""

    pointer: str
    detail: str


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every error answer, `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str = ""
    errors: tuple[FieldError, ...] = ()


class TenfoldError(Exception):
    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str = "", *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail or self.title)
        self.detail = detail
        self.headers = dict(headers or {})

    def problem(self) -> Problem:
        return Problem(type=f"urn:tenfold:error:{self.type}", title=self.title, status=self.status, detail=self.detail)


class Malformed(TenfoldError):
    status = 400
    type = "malformed"
    title = "The request cannot be parsed"


class Unauthenticated(TenfoldError):
    status = 401
    type = "unauthenticated"
    title = "A valid access token is needed"

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(TenfoldError):
    status = 403
    type = "forbidden"
    title = "Not allowed"


class NotFound(TenfoldError):
    status = 404
    type = "not-found"
    title = "Not found"


class MethodNotAllowed(TenfoldError):
    status = 405
    type = "method-not-allowed"
    title = "Method not allowed"


class Conflict(TenfoldError):
    status = 409
    type = "conflict"
    title = "Conflict with the current state"


class PreconditionFailed(TenfoldError):
    status = 412
    type = "precondition-failed"
    title = "The resource has changed since it was read"


class TooLarge(TenfoldError):
    status = 413
    type = "too-large"
    title = "Too large"


class UnsupportedType(TenfoldError):
    status = 415
    type = "unsupported-type"
    title = "Content type not accepted"


class InvalidInput(TenfoldError):
    status = 422
    type = "invalid-input"
    title = "Invalid input"

    def __init__(self, errors: Sequence[FieldError], detail: str = "") -> None:
        super().__init__(detail or "; ".join(f"{e.pointer}: {e.detail}" for e in errors))
        self.errors = tuple(errors)

    def problem(self) -> Problem:
        return msgspec.structs.replace(super().problem(), errors=self.errors)


class RateLimited(TenfoldError):
    status = 429
    type = "rate-limited"
    title = "Too many requests"

    def __init__(self, retry_after: float, detail: str = "") -> None:
        """`retry_after` in seconds."""
        super().__init__(detail, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


class Unavailable(TenfoldError):
    status = 503
    type = "unavailable"
    title = "Temporarily unavailable"

    def __init__(self, detail: str = "", *, retry_after: float = 1) -> None:
        """`retry_after` in seconds."""
        super().__init__(detail, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


class DeadlineExceeded(TenfoldError):
    status = 504
    type = "deadline-exceeded"
    title = "The deadline passed"
