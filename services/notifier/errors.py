"""The errors of notifier, besides those of the platform."""

from shared.errors import Conflict, FieldError, InvalidInput, RateLimited


class InvalidLastEventId(InvalidInput):
    def __init__(self, pointer: str) -> None:
        super().__init__([FieldError(pointer, "is not an id of this stream")])


class TooManyStreams(RateLimited):
    type = "too-many-streams"
    title = "Too many open streams"


class NotAWebhookUrl(InvalidInput):
    def __init__(self, detail: str) -> None:
        super().__init__([FieldError("/url", detail)])


class TooManyWebhooks(Conflict):
    type = "too-many-webhooks"
    title = "Too many webhooks"


class WebhookDisabled(Conflict):
    type = "webhook-disabled"
    title = "The webhook is disabled"


class CampaignEnded(Conflict):
    type = "campaign-ended"
    title = "The campaign is cancelled or done"


class UnknownCategory(InvalidInput):
    def __init__(self, names: list[str]) -> None:
        super().__init__([FieldError(f"/email/{name}", "is not a category of email") for name in names])


class UnknownTimeZone(InvalidInput):
    def __init__(self) -> None:
        super().__init__([FieldError("/window/time_zone", "is not the name of a time zone, such as Europe/Berlin")])


class NotAMoment(InvalidInput):
    def __init__(self, pointer: str) -> None:
        super().__init__([FieldError(pointer, "is not in the years 1 to 9999 of UTC")])
