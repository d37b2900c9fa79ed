"""UUIDv7: unique without asking anybody, and ordered by the time they were made, so indexes stay dense."""

from uuid import UUID

import uuid_utils.compat


def new_id() -> UUID:
    return uuid_utils.compat.uuid7()


def new_text() -> str:
    """One as text, at a seventh of what `str(new_id())` costs."""
    return str(uuid_utils.uuid7())
