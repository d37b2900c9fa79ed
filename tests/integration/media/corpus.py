"""The hostile corpus: files as they come from the world's cameras, editors and attackers, made on the spot.

A case says what must happen: `ready`, a code of failure, or `refused` where the first bytes tell already (415). Of
what is damaged but shows something, both refusing and showing are right where decoders differ: `ready|damaged`.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pyvips

from tests.integration.media.images import bomb, in_cmyk, photo, turned


class Case(NamedTuple):
    name: str
    data: Callable[[], bytes]
    expected: str
    size: tuple[int, int] | None = None  # as it is shown


SMALL = (300, 200)
ANIMATION_PIXELS = 5_000_000


def cases() -> Iterator[Case]:
    yield from _valid()
    yield from _truncated()
    yield from _polyglots()
    yield from _bombs()
    yield from _broken()
    yield from _no_images()


def _valid() -> Iterator[Case]:
    for kind in ("jpeg", "png", "webp", "gif", "avif"):
        yield Case(f"plain-{kind}", partial(photo, *SMALL, kind), "ready", SMALL)
    yield Case("cmyk", in_cmyk, "ready", SMALL)
    yield Case("grey-jpeg", lambda: _image().colourspace("b-w").jpegsave_buffer(), "ready", SMALL)
    yield Case("progressive-jpeg", lambda: _image().jpegsave_buffer(interlace=True), "ready", SMALL)
    yield Case("16-bit-png", lambda: _image().colourspace("rgb16").pngsave_buffer(), "ready", SMALL)
    yield Case("palette-png", lambda: _image().pngsave_buffer(palette=True), "ready", SMALL)
    yield Case("interlaced-png", lambda: _image().pngsave_buffer(interlace=True), "ready", SMALL)
    yield Case("1-bit-png", lambda: pyvips.Image.black(*SMALL).pngsave_buffer(bitdepth=1), "ready", SMALL)
    yield Case("transparent-png", lambda: _image().bandjoin(0).pngsave_buffer(), "ready", SMALL)
    yield Case("one-pixel", lambda: photo(1, 1, "png"), "ready", (1, 1))
    yield Case("one-row", lambda: photo(3000, 1, "png"), "ready", (3000, 1))
    yield Case("one-column", lambda: photo(1, 3000, "png"), "ready", (1, 3000))
    yield Case("turned", turned, "ready", (200, 300))
    for orientation in (0, 9, 65535):
        yield Case(f"orientation-{orientation}", partial(_oriented, orientation), "ready", SMALL)
    yield Case("broken-profile", lambda: _with_profile(b"no profile at all" * 20), "ready", SMALL)
    yield Case("profile-of-another-kind", lambda: _with_profile(_cmyk_profile()), "ready", SMALL)
    yield Case("animated-gif", lambda: animation(3).gifsave_buffer(), "ready", SMALL)
    yield Case("animated-webp", lambda: animation(3).webpsave_buffer(), "ready", SMALL)
    yield Case("lossless-webp", lambda: _image().webpsave_buffer(lossless=True), "ready", SMALL)


def _truncated() -> Iterator[Case]:
    for kind in ("jpeg", "png", "webp", "avif"):
        for percent in (1, 25, 50, 75, 95):
            yield Case(f"{percent}%-of-{kind}", partial(_part, kind, percent), "damaged")
    for percent in (1, 50, 95):
        yield Case(f"{percent}%-of-gif", partial(_part, "gif", percent), "ready|damaged")
    yield Case("jpeg-without-its-end", lambda: photo(*SMALL)[:-2], "ready|damaged")


def _polyglots() -> Iterator[Case]:
    yield Case("jpeg-and-zip", lambda: photo(*SMALL) + _zip(), "ready", SMALL)
    yield Case("jpeg-and-html", lambda: photo(*SMALL) + b"<script>alert(1)</script>", "ready", SMALL)
    yield Case(
        "gif-and-script",
        lambda: b"GIF89a/*" + photo(*SMALL, "gif")[8:] + b"*/=1;alert(1)",
        "ready|damaged|too-many-pixels",
    )
    yield Case("png-and-php", lambda: photo(*SMALL, "png") + b"<?php system($_GET['c']); ?>", "ready", SMALL)
    yield Case("html-in-a-comment", lambda: _jpeg_comment(b"<html><script>alert(1)</script>"), "ready", SMALL)


def _bombs() -> Iterator[Case]:
    """Where animations may have `ANIMATION_PIXELS`."""
    yield Case("pixels", bomb, "too-many-pixels")
    yield Case("pixels-of-jpeg", lambda: _jpeg_of_size(65500, 65500), "too-many-pixels")
    yield Case("pixels-in-the-header", lambda: _png_of_size(2**31 - 1, 2**31 - 1), "damaged|too-many-pixels")
    yield Case("pixels-beyond-32-bits", lambda: _png_of_size(2**32 - 1, 2**32 - 1), "damaged")
    yield Case("frames-of-gif", lambda: animation(100, *SMALL).gifsave_buffer(effort=1), "too-many-pixels")
    yield Case("frames-of-webp", lambda: animation(100, *SMALL).webpsave_buffer(effort=0), "too-many-pixels")
    # The screen, which is not what is decoded: the frames are.
    yield Case("large-screen-of-gif", lambda: _gif_of_size(65535, 65535), "ready")
    yield Case(
        "text", lambda: _png_with(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 9)), "ready|damaged"
    )
    yield Case("profile", lambda: _png_with(b"iCCP", b"x\0\0" + zlib.compress(bytes(200 * 2**20), 9)), "ready|damaged")
    yield Case("many-comments", lambda: _jpeg_comment(*[bytes(60_000)] * 100), "ready|damaged")


def _broken() -> Iterator[Case]:
    yield Case("zeros-after-the-head", lambda: b"\xff\xd8\xff" + bytes(1000), "damaged")
    yield Case("png-of-size-0", lambda: _png_of_size(0, 0), "damaged")
    yield Case("png-with-a-wrong-sum", lambda: _flipped(photo(*SMALL, "png"), 29), "damaged")
    yield Case("png-with-a-wrong-pixel", lambda: _flipped(photo(*SMALL, "png"), 5000), "damaged")
    yield Case("jpeg-with-noise", lambda: _flipped(photo(*SMALL), 4000, 50), "ready|damaged")
    yield Case("webp-with-noise", lambda: _flipped(photo(*SMALL, "webp"), 40, 20), "ready|damaged")
    yield Case("avif-with-noise", lambda: _flipped(photo(*SMALL, "avif"), 300, 50), "ready|damaged")
    yield Case("only-a-head-of-webp", lambda: photo(*SMALL, "webp")[:12] + bytes(60), "damaged")
    yield Case("only-a-head-of-avif", lambda: photo(*SMALL, "avif")[:32] + bytes(60), "damaged")
    yield Case("only-a-head-of-gif", lambda: b"GIF89a" + bytes(100), "damaged")
    yield Case("png-as-webp", lambda: b"RIFF\0\0\0\0WEBP" + photo(*SMALL, "png"), "damaged")
    yield Case(
        "heic-as-avif", lambda: struct.pack(">I4s4sI4s", 20, b"ftyp", b"heic", 0, b"avif") + bytes(500), "damaged"
    )


def _no_images() -> Iterator[Case]:
    yield Case(
        "svg", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "refused"
    )
    yield Case("svg-after-xml", lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "refused")
    yield Case("html", lambda: b"<!doctype html><script>alert(1)</script>", "refused")
    yield Case("pdf", lambda: b"%PDF-1.7\n", "refused")
    yield Case("tiff", lambda: _image().tiffsave_buffer(), "refused")
    yield Case("postscript", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run", "refused")
    yield Case("imagemagick-script", lambda: b"push graphic-context\nfill 'url(https://x/|ls)'", "refused")
    yield Case("zip", _zip, "refused")
    yield Case("elf", lambda: b"\x7fELF" + bytes(100), "refused")
    yield Case("vips", lambda: b"\xb6\xa6\xf2\x08" + bytes(100), "refused")
    yield Case("bmp", lambda: b"BM" + bytes(100), "refused")
    yield Case("heic", lambda: struct.pack(">I4s4sI4s", 20, b"ftyp", b"heic", 0, b"mif1") + bytes(100), "refused")
    yield Case("mp4", lambda: struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"mp42") + bytes(100), "refused")
    yield Case("one-byte", lambda: b"\xff", "refused")
    yield Case("nothing", lambda: b"", "refused")


@cache
def animation(frames: int, width: int = SMALL[0], height: int = SMALL[1]) -> Any:
    """Frames one below the other, as libvips has them."""
    one = pyvips.Image.black(width, height, bands=3).copy(interpretation="srgb")
    shown = [
        one.draw_rect([255.0, 0.0, float(i % 256)], i % (width - 20), 10, 20, 20, fill=True) for i in range(frames)
    ]
    joined = pyvips.Image.arrayjoin(shown, across=1).copy()
    joined.set_type(pyvips.GValue.gint_type, "page-height", height)
    joined.set_type(pyvips.GValue.array_int_type, "delay", [40] * frames)
    return joined


def _image() -> Any:
    return pyvips.Image.new_from_buffer(photo(*SMALL, "png"), "")


def _part(kind: str, percent: int) -> bytes:
    data = photo(*SMALL, kind)
    return data[: max(64, len(data) * percent // 100)]


def _oriented(value: int) -> bytes:
    """As a writer that knows no bounds has it: libvips itself would set it right."""
    data = bytearray(turned())
    at = data.index(b"\x12\x01\x03\x00\x01\x00\x00\x00") + 8
    data[at : at + 2] = struct.pack("<H", value)
    return bytes(data)


def _with_profile(profile: bytes) -> bytes:
    image = _image().copy()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    data: bytes = image.jpegsave_buffer(keep="icc")
    return data


def _cmyk_profile() -> bytes:
    profile: bytes = pyvips.Image.new_from_buffer(in_cmyk(), "").get("icc-profile-data")
    return profile


def _jpeg_comment(*texts: bytes) -> bytes:
    data = photo(*SMALL)
    return data[:2] + b"".join(b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text for text in texts) + data[2:]


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(photo(*SMALL))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _png_of_size(width: int, height: int) -> bytes:
    data = photo(*SMALL, "png")
    return data[:8] + _chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]


def _png_with(kind: bytes, content: bytes) -> bytes:
    data = photo(*SMALL, "png")
    return data[:33] + _chunk(kind, content) + data[33:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _gif_of_size(width: int, height: int) -> bytes:
    data = photo(*SMALL, "gif")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def _flipped(data: bytes, at: int, length: int = 1) -> bytes:
    return data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + length]) + data[at + length :]


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.html", "<script>alert(1)</script>")
    return file.getvalue()
