"""Request and response shapes."""

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from services.media import models

Title = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*(?!\n)$")]


class ChangeMedia(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: Title | UnsetType = UNSET
    visibility: Literal["private", "public"] | UnsetType = UNSET


class CreateUpload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    content_type: Literal["image/jpeg", "image/png", "image/webp", "image/gif", "image/avif"]
    bytes: Annotated[int, Meta(ge=1)]


class Upload(msgspec.Struct, frozen=True):
    """Send the bytes to `upload_url` with `method` and `headers` before `expires_at`, then complete the upload."""

    id: UUID
    upload_url: str
    method: Literal["PUT"]
    headers: dict[str, str]
    expires_at: datetime


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Both are part of the URLs that the API hands out."""

    expires: Annotated[str, Meta(pattern=r"^[0-9]{1,12}$")] = ""
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")] = ""


class Variant(msgspec.Struct, frozen=True):
    name: str
    content_type: str
    width: int
    height: int
    bytes: int
    url: str


class Media(msgspec.Struct, frozen=True):
    id: UUID
    owner_id: UUID
    title: str
    visibility: Literal["private", "public"]
    status: Literal["processing", "ready", "failed"]
    failure: str | None
    content_type: str
    bytes: int
    width: int | None
    height: int | None
    sha256: str
    placeholder: str | None
    variants: list[Variant]
    original_url: str
    created_at: datetime
    updated_at: datetime
    version: int

    @classmethod
    def of(cls, image: models.Image, signed_url: Callable[[str], str]) -> "Media":
        return cls(
            id=image.id,
            owner_id=image.owner_id,
            title=image.title,
            visibility=image.visibility.value,
            status=image.status.value,
            failure=image.failure,
            content_type=image.content_type,
            bytes=image.bytes,
            width=image.width,
            height=image.height,
            sha256=image.sha256,
            placeholder=image.placeholder,
            variants=[
                Variant(
                    v.name,
                    models.VARIANT_TYPE,
                    v.width,
                    v.height,
                    v.bytes,
                    signed_url(models.variant_path(image.id, v.name)),
                )
                for v in image.variants
            ],
            original_url=signed_url(models.original_path(image.id)),
            created_at=image.created_at,
            updated_at=image.updated_at,
            version=image.version,
        )


class Usage(msgspec.Struct, frozen=True):
    bytes: int
    items: int
    quota_bytes: int
    quota_items: int

    @classmethod
    def of(cls, usage: models.Usage, quota: models.Quota) -> "Usage":
        return cls(usage.bytes, usage.items, quota.bytes, quota.items)
