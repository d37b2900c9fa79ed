"""The type of an image by its first bytes."""

import pytest

from services.media.content_types import sniff


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "image/png"),
        (b"RIFF\x24\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b"GIF87a\x01\x00", "image/gif"),
        (b"GIF89a\x01\x00", "image/gif"),
        (b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00avifmif1", "image/avif"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00miafavif", "image/avif"),
    ],
)
def test_knows_the_accepted_types(head: bytes, expected: str) -> None:
    assert sniff(head) == expected


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xff\xd8",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<?xml version='1.0'?><svg/>",
        b"%PDF-1.7",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        b"GIF90a",
        b"BM\x00\x00",
        b"II*\x00",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
        b"\x00\x00\x00\x14ftypmp42\x00\x00\x00\x00mp42avif",  # the brand lies outside of the box
        b"GIF",
        b"hello, world",
    ],
)
def test_takes_nothing_else(head: bytes) -> None:
    assert sniff(head) is None
