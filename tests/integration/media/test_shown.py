"""What strangers get of an original: its very pixels, and nothing that says where, when and by whom it was taken."""

from pathlib import Path
from typing import Any

import pytest
import pyvips

from services.media.models import Piece, Shown, cut
from services.media.shown import shown
from tests.integration.media import images
from tests.integration.media.corpus import animation

SECRETS = (b"Secretive", b"<script", b"PK\x03\x04", b"GPS")
KINDS = ("jpeg", "png", "webp", "gif", "avif")


def composed(data: bytes, how: Shown) -> bytes:
    """What `how` makes of the original `data`, as the API sends it."""
    pieces = (p if isinstance(p, bytes) else data[p[0] : sum(p)] for p in cut(how.pieces, 0, how.bytes))
    return b"".join(pieces)


def talkative(kind: str, orientation: int = 6) -> bytes:
    """An image with EXIF, XMP and a comment that tell, turned by a quarter, with a file of another kind behind it."""
    image = pyvips.Image.new_from_buffer(images.photo(300, 200), "").copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Make", "Secretive Camera")
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd3-GPSLatitude", "1/1 2/1 3/1")
    image.set_type(pyvips.GValue.blob_type, "xmp-data", b"<x:xmpmeta>Secretive GPS</x:xmpmeta>")
    image.set_type(pyvips.GValue.gstr_type, "png-comment-0-Author", "Secretive")
    data: bytes = image.write_to_buffer({"jpeg": ".jpg"}.get(kind, f".{kind}"))
    return data + b"PK\x03\x04<script>"


def upright(data: bytes) -> Any:
    return pyvips.Image.new_from_buffer(data, "").autorot()


def same_pixels(one: bytes, other: bytes) -> bool:
    a, b = upright(one), upright(other)
    return (a.width, a.height) == (b.width, b.height) and (a - b).abs().max() == 0


def of(data: bytes, kind: str, folder: Path, orientation: int = 1) -> Shown | None:
    path = folder / "original"
    path.write_bytes(data)
    return shown(path, f"image/{kind}", orientation)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_metadata_go_and_the_picture_stays_as_it_was(tmp_path: Path, kind: str, orientation: int) -> None:
    data = talkative(kind, orientation)
    assert b"Secretive" in data
    how = of(data, kind, tmp_path, orientation)
    assert how is not None
    made = composed(data, how)
    assert (len(made), any(secret in made for secret in SECRETS)) == (how.bytes, False)
    assert same_pixels(data, made)
    told = images.metadata(made)
    # All that EXIF says is how the image is turned (AVIF says that by other means); libvips itself adds the defaults of
    # what every EXIF block has.
    assert ("orientation" in told) is (orientation != 1 and kind != "avif")
    assert not any("Make" in name or "GPS" in name for name in told)


@pytest.mark.parametrize("kind", KINDS)
def test_what_tells_nothing_is_shown_as_it_is(tmp_path: Path, kind: str) -> None:
    data = images.photo(300, 200, kind)
    how = of(data, kind, tmp_path)
    assert how is not None
    assert same_pixels(data, composed(data, how))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_what_moves_goes_on_moving(tmp_path: Path, kind: str) -> None:
    image = animation(3).copy()
    image.set_type(pyvips.GValue.gint_type, "loop", 2)
    image.set_type(pyvips.GValue.gstr_type, "gif-comment", "Secretive")
    data: bytes = image.write_to_buffer(f".{kind}")
    how = of(data, kind, tmp_path)
    assert how is not None
    moving = pyvips.Image.new_from_buffer(composed(data, how), "", n=-1)
    assert (moving.get("n-pages"), moving.get("delay"), moving.get("loop")) == (3, [40] * 3, 2)
    assert b"Secretive" not in composed(data, how)


def test_a_comment_of_a_gif_goes(tmp_path: Path) -> None:
    data = images.photo(300, 200, "gif")
    comment = b"\x21\xfe\x09Secretive\x00\x21\xff\x0bXMP DataXMP\x09Secretive\x00"
    talking = data[:-1] + comment + data[-1:] + b"PK\x03\x04"
    how = of(talking, "gif", tmp_path)
    assert how is not None
    assert composed(talking, how) == data


@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_too_soon_or_is_noise_is_not_shown(tmp_path: Path, kind: str) -> None:
    data = images.photo(300, 200, kind)
    for end in (5, 12, 19, 40, len(data) // 2):
        assert of(data[:end], kind, tmp_path) is None, end
    assert of(data[:12] + b"\xff" * 1000, kind, tmp_path) is None


def test_thousands_of_pieces_are_not_followed(tmp_path: Path) -> None:
    data = images.photo(300, 200)
    scattered = data[:2] + b"\xff\xfe\x00\x03x\xff\xdd\x00\x04\x00\x00" * 500 + data[2:]
    assert of(scattered, "jpeg", tmp_path) is None


def test_any_range_of_the_pieces() -> None:
    data = bytes(range(100))
    pieces: tuple[Piece, ...] = ((0, 10), b"abc", (50, 1), b"", (20, 30))
    how = Shown(pieces, 44, "")
    whole = composed(data, how)
    assert len(whole) == how.bytes
    for start in range(45):
        for length in range(45 - start):
            parts = (p if isinstance(p, bytes) else data[p[0] : sum(p)] for p in cut(pieces, start, length))
            assert b"".join(parts) == whole[start : start + length]
