"""The errors of users, besides those of the platform."""

from shared.errors import Conflict, FieldError, Forbidden, InvalidInput, NotFound, RateLimited, Unauthenticated


class AddressTaken(Conflict):
    type = "address-taken"
    title = "There is an account with this address"


class NotAnAddress(InvalidInput):
    def __init__(self, detail: str = "is not an email address") -> None:
        super().__init__([FieldError("/email", detail)])


class WeakPassword(InvalidInput):
    type = "weak-password"
    title = "The password is too easy to guess"

    def __init__(self, pointer: str) -> None:
        super().__init__([FieldError(pointer, "is among the most common passwords")])


class WrongCredentials(Unauthenticated):
    type = "wrong-credentials"
    title = "The address or the password is wrong"


class InvalidRefreshToken(Unauthenticated):
    type = "invalid-refresh-token"
    title = "The refresh token is not valid, expired or spent"


class WrongPassword(InvalidInput):
    """Not 401: the access token is good, and the client must not take it for expired."""

    type = "wrong-password"
    title = "The current password is wrong"

    def __init__(self) -> None:
        super().__init__([FieldError("/current_password", "is not the current password")])


class AccountDisabled(Forbidden):
    type = "account-disabled"
    title = "The account is disabled"


class TooManyAttempts(RateLimited):
    type = "too-many-attempts"
    title = "Too many attempts with wrong credentials"


class LinkNotValid(NotFound):
    type = "link-not-valid"
    title = "The link is not valid, expired or used"


class OwnAccount(Conflict):
    type = "own-account"
    title = "Another administrator has to change this account"


class LastAdministrator(Conflict):
    type = "last-administrator"
    title = "Make somebody else an administrator first"
