"""The object store: a local directory (`file:///path`) or S3 (`s3://bucket`), through obstore.

Keys are ours, never a user's. Nothing holds a whole object in memory. Every call is bounded.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from shared.errors import Unavailable

_CALL_SECONDS = 30.0
_STREAM_BYTES = 256 * 1024
_PART_BYTES = 5 * 1024 * 1024
_PARTS_AT_A_TIME = 2  # so that a stream takes at most some 10 MiB of memory


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    bytes: int


class Objects:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def at(cls, url: str) -> "Objects":
        parts = urlsplit(url)
        if parts.scheme == "file":
            return cls(LocalStore(Path(unquote(parts.path)), automatic_cleanup=True, mkdir=True))
        return cls(from_url(url, client_options={"timeout": timedelta(seconds=_CALL_SECONDS)}))

    async def put(self, key: str, data: bytes | AsyncIterator[bytes], *, seconds: float = _CALL_SECONDS) -> None:
        """Store `data` under `key`, whole or not at all. A stream is read as it is stored, so its pace counts."""
        async with _bounded(seconds):
            await obstore.put_async(self._store, key, data, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_A_TIME)

    async def get(self, key: str) -> bytes:
        """The whole object, for small ones. Raises `FileNotFoundError`."""
        async with _bounded():
            answer = await obstore.get_async(self._store, key)
            return bytes(await answer.bytes_async())

    async def head(self, key: str) -> ObjectInfo | None:
        async with _bounded():
            try:
                meta = await obstore.head_async(self._store, key)
            except FileNotFoundError:
                return None
        return ObjectInfo(key, meta["size"])

    async def stream(self, key: str, start: int, length: int) -> AsyncIterator[bytes]:
        """`length` bytes from `start`, in pieces."""
        position, end = start, start + length
        while position < end:
            size = min(_STREAM_BYTES, end - position)
            async with _bounded():
                piece = await obstore.get_range_async(self._store, key, start=position, length=size)
            yield bytes(piece)
            position += size

    async def move(self, source: str, target: str) -> None:
        async with _bounded():
            await obstore.rename_async(self._store, source, target)

    async def delete(self, *keys: str) -> None:
        """Gone afterwards, whether it was there or not, with what a killed process left of a half-written one.

        On S3 that is an incomplete multipart upload: the bucket's lifecycle rule aborts it.
        """
        async with _bounded():
            for key in keys:
                with suppress(FileNotFoundError):
                    await obstore.delete_async(self._store, key)
                if isinstance(self._store, LocalStore):
                    await asyncio.to_thread(_delete_half_written, Path(str(self._store.prefix), key))


def _delete_half_written(path: Path) -> None:
    """The store writes `key#1` and renames it, or `key#2` where that exists, and so on."""
    with suppress(FileNotFoundError):
        for number in itertools.count(1):
            path.with_name(f"{path.name}#{number}").unlink()


@asynccontextmanager
async def _bounded(seconds: float = _CALL_SECONDS) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Unavailable("the object store takes too long") from error
    except BaseError as error:  # what is not there is a FileNotFoundError, and no such error
        raise Unavailable("the object store does not answer as it should") from error
