"""The errors of notifier, besides those of the platform."""

from shared.errors import FieldError, InvalidInput, RateLimited


class InvalidLastEventId(InvalidInput):
    def __init__(self, pointer: str) -> None:
        super().__init__([FieldError(pointer, "is not an id of this stream")])


class TooManyStreams(RateLimited):
    type = "too-many-streams"
    title = "Too many open streams"
