"""What the environment says to media."""

import os
from typing import Annotated

import msgspec

from shared.settings import Count, DataSettings, Seconds, Secret


class Settings(DataSettings, frozen=True, kw_only=True):
    object_store_url: str  # file:///directory or s3://bucket
    object_store_public_endpoint: str | None = None  # of S3, where clients reach it by another name than we do
    redirect_to_store: bool = False  # variants are fetched from the store itself, by presigned URLs
    url_secret: Secret  # signs delivery URLs
    jwks_url: str  # the API verifies access tokens with these keys
    port: int = 8002
    url_seconds: Annotated[int, msgspec.Meta(ge=60)] = 24 * 3600  # a signed URL holds at least half as long
    upload_max_bytes: Count = 25 * 1024 * 1024
    upload_seconds: Seconds = 600.0
    presigned_seconds: Annotated[int, msgspec.Meta(ge=1, le=7 * 24 * 3600)] = 3600  # to send the bytes of an upload
    upload_stall_seconds: Seconds = 15.0
    quota_bytes: Count = 5 * 1024**3
    quota_items: Count = 10_000
    sweep_seconds: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    # Of one image, in a process of its own.
    processes: Count = msgspec.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    events_in_hand: Count = 1000  # of a worker: among these, owners take turns
    max_pixels: Count = 50_000_000
    max_animation_pixels: Count = 100_000_000  # of all frames
    process_seconds: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    process_memory_bytes: Count = 1024**3
