"""Cursor paging, newest first: `?limit=1..100&cursor=...` -> `{"items": [...], "next_cursor": "..." | null}`.

Ids are UUIDv7, so the id of the last item is the cursor; it is opaque to callers.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Generic, TypeVar
from uuid import UUID

import msgspec

from shared.errors import FieldError, InvalidInput

T = TypeVar("T")
R = TypeVar("R")


class PageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    cursor: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{22}$")] | None = None

    def before(self) -> UUID:
        """Only items with ids below this one are asked for."""
        if self.cursor is None:
            return UUID(int=2**128 - 1)
        try:
            return UUID(bytes=base64.b64decode(f"{self.cursor}==", altchars=b"-_", validate=True))
        except (ValueError, binascii.Error):
            raise InvalidInput([FieldError("?cursor", "is not a cursor of ours")]) from None


class Page(msgspec.Struct, Generic[T], frozen=True):
    items: list[T]
    next_cursor: str | None


def page(found: Sequence[R], query: PageQuery, render: Callable[[R], T], id_of: Callable[[R], UUID]) -> Page[T]:
    """The page of `found`, which was asked for with `limit + 1` to see whether more follow."""
    shown = found[: query.limit]
    more = len(found) > query.limit
    cursor = base64.urlsafe_b64encode(id_of(shown[-1]).bytes).decode().rstrip("=") if more else None
    return Page([render(item) for item in shown], cursor)
