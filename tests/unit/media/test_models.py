"""Rules that need nothing else."""

import msgspec
import pytest

from services.media.content_types import extension
from services.media.models import VARIANTS, Quota, Usage, all_keys
from services.media.schemas import ChangeMedia, Signature
from shared.ids import new_id


@pytest.mark.parametrize(
    ("usage", "allowed"), [(Usage(0, 0), True), (Usage(100, 2), True), (Usage(101, 2), False), (Usage(100, 3), False)]
)
def test_quota_counts_bytes_and_items(usage: Usage, allowed: bool) -> None:
    assert Quota(bytes=100, items=2).allows(usage) is allowed


def test_all_keys_has_the_original_and_every_variant() -> None:
    blob_id = new_id()
    assert all_keys(blob_id) == [
        f"originals/{blob_id}",
        *(f"variants/{blob_id}/{name}.webp" for name in ("small", "medium", "large", "animated")),
    ]
    assert VARIANTS == {"small": 256, "medium": 640, "large": 1280}


def test_extension() -> None:
    assert extension("image/jpeg") == "jpg"
    assert extension("image/webp") == "webp"


@pytest.mark.parametrize("body", [{"title": "x" * 201}, {"title": "a\nb"}, {"visibility": "secret"}, {"owner_id": "x"}])
def test_change_refuses(body: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(body, ChangeMedia)


@pytest.mark.parametrize("query", [{"expires": "-1"}, {"expires": "1" * 13}, {"signature": "xyz"}, {"other": "1"}])
def test_signature_refuses(query: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(query, Signature)
