"""The URL table. Request and response types stand in the handlers' signatures."""

from services.media.handlers import Handlers
from shared.application import Access, Route

_ACCEPTED = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/avif", "multipart/form-data")


def routes(h: Handlers) -> list[Route]:
    return [
        Route("POST", "/api/v1/media", h.upload, status=202, streaming=True, consumes=_ACCEPTED, idempotent=True),
        Route("POST", "/api/v1/media/uploads", h.create_upload, status=201, idempotent=True),
        Route(
            "PUT",
            "/api/v1/media/uploads/{upload_id}",
            h.receive_upload,
            Access.PUBLIC,  # who has the signed URL
            streaming=True,
            consumes=_ACCEPTED[:-1],
        ),
        Route("POST", "/api/v1/media/uploads/{upload_id}/complete", h.complete_upload, status=202, streaming=True),
        Route("GET", "/api/v1/media", h.list_media),
        Route("GET", "/api/v1/media/usage", h.get_usage),
        Route("GET", "/api/v1/media/{media_id}", h.get_media),
        Route("PATCH", "/api/v1/media/{media_id}", h.change_media),
        Route("DELETE", "/api/v1/media/{media_id}", h.delete_media),
        Route("GET", "/api/v1/media/{media_id}/original", h.get_original, Access.OPTIONAL, streaming=True),
        Route("HEAD", "/api/v1/media/{media_id}/original", h.get_original, Access.OPTIONAL, streaming=True),
        Route("GET", "/api/v1/media/{media_id}/variants/{name}", h.get_variant, Access.OPTIONAL, streaming=True),
        Route("HEAD", "/api/v1/media/{media_id}/variants/{name}", h.get_variant, Access.OPTIONAL, streaming=True),
    ]
