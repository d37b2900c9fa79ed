"""The errors of users, besides those of the platform."""

from shared.errors import Conflict, FieldError, InvalidInput, Unauthenticated


class AddressTaken(Conflict):
    type = "address-taken"
    title = "There is an account with this address"


class NotAnAddress(InvalidInput):
    def __init__(self) -> None:
        super().__init__([FieldError("/email", "is not an email address")])


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
