"""What the gateway itself may answer besides the shared errors."""

from shared.errors import Malformed, TenfoldError, Unavailable


class AmbiguousRequest(Malformed):
    """Two readings of one request are possible, and the service behind might choose the other one."""

    type = "ambiguous-request"


class TooSlow(TenfoldError):
    status = 408
    type = "too-slow"
    title = "The request body did not arrive in time"


class AnswerBrokeOff(Unavailable):
    """A service's answer ended too early. Its head is out already, so the caller sees its connection cut."""
