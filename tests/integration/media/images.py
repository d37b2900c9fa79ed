"""Images for tests, made once each."""

from functools import cache
from typing import Any

import pyvips


@cache
def photo(width: int = 1600, height: int = 1200, kind: str = "jpeg", seed: int = 1) -> bytes:
    """Something with structure in it; another `seed` gives other bytes."""
    noise = pyvips.Image.perlin(width, height, cell_size=64, seed=seed)
    bands = noise.bandjoin([noise.fliphor(), noise.flipver()])
    image = ((bands + 1) * 127).cast("uchar").copy(interpretation="srgb")
    options: dict[str, Any] = {"jpeg": {"Q": 85}, "avif": {"effort": 0}, "gif": {"effort": 1}}.get(kind, {})
    data: bytes = image.write_to_buffer({"jpeg": ".jpg"}.get(kind, f".{kind}"), **options)
    return data


@cache
def turned() -> bytes:
    """300 x 200 in the file, 200 x 300 to the eye, and it says where it was taken."""
    image = pyvips.Image.new_from_buffer(photo(300, 200), "").copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", 6)
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Make", "Secretive Camera")
    data: bytes = image.jpegsave_buffer()
    return data


@cache
def with_xmp(size: int) -> bytes:
    """An AVIF with so many bytes of metadata."""
    image = pyvips.Image.new_from_buffer(photo(300, 200), "").copy()
    image.set_type(pyvips.GValue.blob_type, "xmp-data", b"<x:xmpmeta>" + b"x" * (size - 11))
    data: bytes = image.write_to_buffer(".avif", effort=0)
    return data


@cache
def bomb() -> bytes:
    """900 megapixels in less than a megabyte."""
    data: bytes = pyvips.Image.black(30_000, 30_000).pngsave_buffer(compression=9, bitdepth=1)
    return data


def size(data: bytes) -> tuple[int, int]:
    image = pyvips.Image.new_from_buffer(data, "")
    return image.width, image.height


def metadata(data: bytes) -> set[str]:
    fields = pyvips.Image.new_from_buffer(data, "").get_fields()
    return {name for name in fields if name.startswith(("exif", "xmp", "iptc", "icc", "orientation"))}


@cache
def in_cmyk() -> bytes:
    image = pyvips.Image.new_from_buffer(photo(300, 200), "").icc_transform("cmyk", input_profile="srgb")
    data: bytes = image.jpegsave_buffer(Q=95)
    return data


def difference(one: bytes, other: bytes) -> float:
    """The mean difference of the colours, 0 to 255, of images of one size."""
    a, b = (pyvips.Image.new_from_buffer(data, "").extract_band(0, n=3) for data in (one, other))
    mean: float = (a.cast("float") - b.cast("float")).abs().avg()
    return mean
