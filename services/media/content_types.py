"""The type of an image by its first bytes; names and declared types are not believed."""

SNIFFED_BYTES = 64  # that many are enough to tell

_AVIF_BRANDS = (b"avif", b"avis")


def sniff(head: bytes) -> str | None:
    """The content type of what starts with `head`; `None` for everything that is not accepted."""
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head[4:8] == b"ftyp" and _has_avif_brand(head):
        return "image/avif"
    return None


def _has_avif_brand(head: bytes) -> bool:
    """The major brand (8..12) or a compatible one (from 16 to the end of the box)."""
    box = head[: int.from_bytes(head[:4])]
    return any(box[at : at + 4] in _AVIF_BRANDS for at in (8, *range(16, len(box), 4)))


def extension(content_type: str) -> str:
    return {"image/jpeg": "jpg"}.get(content_type, content_type.removeprefix("image/"))
