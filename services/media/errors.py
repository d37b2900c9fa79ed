"""The errors of media, besides those of the platform."""

from shared.errors import Conflict, FieldError, InvalidInput, TenfoldError, UnsupportedType


class NotAnImage(UnsupportedType):
    type = "not-an-image"
    title = "The content is no JPEG, PNG, WebP, GIF or AVIF image"


class EmptyUpload(InvalidInput):
    type = "empty-upload"
    title = "There is no image in the request"

    def __init__(self) -> None:
        super().__init__([FieldError("/file", "is required and must not be empty")])


class QuotaExceeded(Conflict):
    """409 and not 413: this very image is welcome once there is room for it."""

    type = "quota-exceeded"
    title = "The upload exceeds the quota"


class UploadTimeout(TenfoldError):
    status = 408
    type = "upload-timeout"
    title = "The upload stalled or took too long"


class UploadIncomplete(Conflict):
    """The client can send the bytes (again) and complete the upload after that."""

    type = "upload-incomplete"
    title = "The bytes that were announced are not there"


class UploadCompleted(Conflict):
    type = "upload-completed"
    title = "The upload is complete already"


class RangeNotSatisfiable(TenfoldError):
    status = 416
    type = "range-not-satisfiable"
    title = "There are no such bytes"

    def __init__(self, size: int) -> None:
        super().__init__(headers={"Content-Range": f"bytes */{size}"})
