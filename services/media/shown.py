"""What of an original may be shown to everybody: the picture as it was stored, and nothing else that the file says.

A photo tells where, when and by whom it was taken, and may hide whole other files. So what strangers get is put
together from spans of the stored bytes, by lists of what a picture needs; what is not on a list is left out, and of a
file that cannot be followed by them nothing is shown. The pixels are the same: nothing is encoded anew. How the image
is turned, which metadata say, is kept, alone.

Runs in the child process (`imaging`), since it reads strangers' bytes.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from services.media.models import Piece, Shown

# A photo has some five pieces, and few bytes that are not its own; who needs thousands is up to something.
_MOST_PIECES = 200
_MOST_BYTES = 64 * 1024


class _NotFollowed(Exception):
    """The file is not built as we know it."""


def shown(source: Path, content_type: str, orientation: int) -> Shown | None:
    """How `source` is shown; `orientation` is that of EXIF, 1 for upright. `None` when it cannot be."""
    data = source.read_bytes()
    try:
        pieces = _joined(_PARTS[content_type](data, orientation if 2 <= orientation <= 8 else 1))
    except (_NotFollowed, IndexError):
        return None
    if len(pieces) > _MOST_PIECES or sum(len(piece) for piece in pieces if isinstance(piece, bytes)) > _MOST_BYTES:
        return None
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        part = memoryview(piece) if isinstance(piece, bytes) else memoryview(data)[piece[0] : sum(piece)]
        digest.update(part)
        size += len(part)
    return Shown(pieces, size, digest.hexdigest())


def _joined(parts: Iterator[Piece]) -> tuple[Piece, ...]:
    """The parts in order, neighbours in one piece."""
    pieces: list[Piece] = []
    for part in parts:
        last = pieces[-1] if pieces else None
        if isinstance(part, tuple) and isinstance(last, tuple) and sum(last) == part[0]:
            pieces[-1] = (last[0], last[1] + part[1])
        elif isinstance(part, bytes) and isinstance(last, bytes):
            pieces[-1] = last + part
        else:
            pieces.append(part)
    return tuple(pieces)


def _number(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise _NotFollowed
    return int.from_bytes(data[at : at + size])


def _exif(orientation: int) -> bytes:
    """A TIFF block that says how the image is turned and nothing else."""
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01" + orientation.to_bytes(2) + b"\x00\x00"
    return b"MM\x00\x2a\x00\x00\x00\x08\x00\x01" + entry + b"\x00\x00\x00\x00"


# JPEG: the frame headers, the tables, the scans. What the entropy coder writes is never such a marker.
_JPEG_KEPT = frozenset({0xC4, 0xCC, 0xDA, 0xDB, 0xDD}) | frozenset(range(0xC0, 0xD0)) - {0xC8}
_JPEG_DROPPED = frozenset(range(0xE0, 0xF0)) | {0xFE}
_JPEG_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _jpeg(data: bytes, orientation: int) -> Iterator[Piece]:
    yield (0, 2)
    if orientation != 1:
        yield b"\xff\xe1\x00\x22Exif\x00\x00" + _exif(orientation)
    at = 2
    while True:
        while _number(data, at, 2) == 0xFFFF:
            at += 1
        start, marker = at, _number(data, at, 2) - 0xFF00
        if marker == 0xD9:
            yield (start, 2)
            return
        end = start + 2 + _number(data, start + 2, 2)
        at = end
        body = data[start + 4 : end]
        if marker == 0xDA:
            if (following := _JPEG_AFTER_SCAN.search(data, end)) is None:
                raise _NotFollowed
            at = following.start()
            yield (start, at - start)
        elif marker in _JPEG_KEPT or (marker == 0xE2 and body.startswith(b"ICC_PROFILE\x00")):
            yield (start, end - start)
        elif marker == 0xE0 and body.startswith(b"JFIF\x00") and len(body) >= 14:
            yield b"\xff\xe0\x00\x10" + body[:12] + b"\x00\x00"  # without its thumbnail
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            yield b"\xff\xee\x00\x0e" + body[:12]  # how the colours are coded
        elif marker not in _JPEG_DROPPED:
            raise _NotFollowed


_PNG_KEPT = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP"}
    | {b"mDCV", b"cLLI", b"bKGD", b"pHYs", b"acTL", b"fcTL", b"fdAT"}
)


def _png(data: bytes, orientation: int) -> Iterator[Piece]:
    yield (0, 8)
    at, kind = 8, b""
    while kind != b"IEND":
        end = at + 12 + _number(data, at, 4)
        kind = data[at + 4 : at + 8]
        if end > len(data):
            raise _NotFollowed
        if kind in _PNG_KEPT:
            yield (at, end - at)
        elif not kind[:1].islower():
            raise _NotFollowed  # critical, and not one we know
        if kind == b"IHDR" and orientation != 1:
            chunk = b"eXIf" + _exif(orientation)
            yield (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
        at = end


_WEBP_KEPT = frozenset({b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ICCP"})
_WEBP_FRAME = frozenset({b"VP8 ", b"VP8L", b"ALPH"})
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04


def _webp(data: bytes, orientation: int) -> Iterator[Piece]:
    turned = orientation != 1
    parts: list[Piece] = []
    if not data.startswith(b"RIFF") or len(data) < 20:
        raise _NotFollowed
    for kind, start, end in _riff(data, 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))):
        if kind == b"VP8X":
            flags = data[start + 8] & ~(_WEBP_EXIF | _WEBP_XMP) | (_WEBP_EXIF if turned else 0)
            parts += [(start, 8), bytes([flags]), (start + 9, end - start - 9)]
        elif kind == b"ANMF":
            # It begins with 16 bytes of its own; what its frame may hold besides pixels is told by names again.
            if any(inner not in _WEBP_FRAME for inner, _, _ in _riff(data, start + 24, end)):
                raise _NotFollowed
            parts.append((start, end - start))
        elif kind in _WEBP_KEPT:
            parts.append((start, end - start))
    if turned:
        exif = _exif(orientation)
        parts.append(b"EXIF" + len(exif).to_bytes(4, "little") + exif)
    size = sum(len(part) if isinstance(part, bytes) else part[1] for part in parts)
    yield b"RIFF" + (size + 4).to_bytes(4, "little") + b"WEBP"
    yield from parts


def _riff(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk, padding included."""
    while at + 8 <= end:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        following = at + 8 + size + size % 2
        if following > end:
            raise _NotFollowed
        yield data[at : at + 4], at, following
        at = following


_GIF_LOOPS = (b"NETSCAPE2.0", b"ANIMEXTS1.0")


def _gif(data: bytes, _orientation: int) -> Iterator[Piece]:
    at = 13 + _gif_table(data[10])
    yield (0, at)
    while True:
        start, block = at, data[at]
        if block == 0x3B:
            yield (start, 1)
            return
        if block == 0x2C:
            at = _gif_end(data, start + 10 + _gif_table(data[start + 9]) + 1)
            yield (start, at - start)
        elif block == 0x21:
            at = _gif_end(data, start + 2)
            loops = data[start + 3 : start + 14] in _GIF_LOOPS and at - start == 19
            if (data[start + 1] == 0xF9 and at - start == 8) or (data[start + 1] == 0xFF and loops):
                yield (start, at - start)
        else:
            raise _NotFollowed


def _gif_table(flags: int) -> int:
    """Bytes of the colour table that `flags` announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_end(data: bytes, at: int) -> int:
    """Where the sub-blocks that begin at `at` end."""
    while (size := data[at]) != 0:
        at += 1 + size
    return at + 1


# AVIF keeps metadata as items among those of the picture, found by their offsets in the file: they are blanked out.
# By container, the bytes before its boxes and the boxes that tell nothing.
_AVIF_BOXES: Mapping[bytes, tuple[int, frozenset[bytes]]] = {
    b"": (0, frozenset({b"ftyp", b"meta", b"mdat"})),
    b"meta": (4, frozenset({b"hdlr", b"pitm", b"iloc", b"iinf", b"iprp", b"iref", b"idat", b"grpl"})),
    b"iprp": (0, frozenset({b"ipco", b"ipma"})),
    b"ipco": (
        0,
        frozenset({b"ispe", b"pixi", b"av1C", b"colr", b"pasp", b"clap", b"irot", b"imir", b"auxC", b"a1op", b"a1lx"})
        | {b"lsel", b"clli", b"mdcv"},
    ),
    b"iinf": (6, frozenset({b"infe"})),
}
_AVIF_ITEMS = frozenset({b"av01", b"grid", b"iovl", b"iden", b"tmap"})


def _avif(data: bytes, _orientation: int) -> Iterator[Piece]:
    told: set[int] = set()
    places: dict[int, list[tuple[int, int]]] = {}
    whole = 0
    for kind, at, end in _avif_boxes(data, b"", 0, len(data)):
        if kind in _AVIF_BOXES[b""][1]:
            whole = end  # what comes after the last box is left out
        if kind == b"infe":
            item, type_ = _number(data, at + 4, 2), data[at + 8 : at + 12]
            if data[at] != 2:
                raise _NotFollowed
            if type_ not in _AVIF_ITEMS:
                told.add(item)
        elif kind == b"iloc":
            places = dict(_avif_places(data, at))
        elif kind == b"idat" and end > at:
            raise _NotFollowed
    if not places or any(start + size > whole for item in places.values() for start, size in item):
        raise _NotFollowed
    at = 0
    for start, size in sorted(place for item in told for place in places.get(item, ())):
        if start < at:
            raise _NotFollowed
        yield (at, start - at)
        yield bytes(size)
        at = start + size
    yield (at, whole - at)


def _avif_boxes(data: bytes, container: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of what is in each box, those in it included."""
    skipped, kinds = _AVIF_BOXES[container]
    at += skipped
    while at < end:
        size, kind = _number(data, at, 4) or end - at, data[at + 4 : at + 8]
        if kind not in kinds or size < 8 or at + size > end:
            if container:
                raise _NotFollowed
            return
        yield kind, at + 8, at + size
        if kind in _AVIF_BOXES:
            yield from _avif_boxes(data, kind, at + 8, at + size)
        at += size


def _avif_places(data: bytes, at: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """By item, where in the file its bytes are and how many (ISO/IEC 14496-12, the box `iloc`)."""
    version = data[at]
    offset_size, length_size = divmod(data[at + 4], 16)
    base_size, index_size = divmod(data[at + 5], 16)
    if version > 1:
        raise _NotFollowed
    count, at = _number(data, at + 6, 2), at + 8
    for _ in range(count):
        item, at = _number(data, at, 2), at + 2
        if version == 1:
            if _number(data, at, 2) & 15:
                raise _NotFollowed  # not offsets in the file
            at += 2
        base, at = _number(data, at + 2, base_size), at + 2 + base_size
        extents, at = _number(data, at, 2), at + 2
        places = []
        for _ in range(extents):
            at += index_size if version == 1 else 0
            offset, size = _number(data, at, offset_size), _number(data, at + offset_size, length_size)
            at += offset_size + length_size
            places.append((base + offset, size))
        yield item, places


_PARTS: Mapping[str, Callable[[bytes, int], Iterator[Piece]]] = {
    "image/jpeg": _jpeg,
    "image/png": _png,
    "image/webp": _webp,
    "image/gif": _gif,
    "image/avif": _avif,
}
