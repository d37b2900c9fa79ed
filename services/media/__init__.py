"""Media: images, their storage and their variants.

Owns the schema `media` and the object store. Serves upload, list, delivery, quota. Produces `media.uploaded.v1`,
`media.processed.v1`, `media.failed.v1` and `media.deleted.v1` on `media.events`. The worker consumes the first, to make
the variants, and the last, to delete the bytes, and `user.deleted.v1`, to delete what the user had.
"""
