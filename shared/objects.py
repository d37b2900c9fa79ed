"""The object store: a local directory (`file:///path`) or S3 (`s3://bucket`), through obstore.

Keys are ours, never a user's. Nothing holds a whole object in memory. Every call is bounded.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import aiohttp
import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store, from_url
from yarl import URL

from shared.errors import TenfoldError, Unavailable

if TYPE_CHECKING:
    from obstore import HTTP_METHOD, SignCapableStore
    from obstore.store import ClientConfig

_CALL_SECONDS = 30.0
_STREAM_BYTES = 256 * 1024
_PART_BYTES = 5 * 1024 * 1024  # S3 takes no smaller ones; a stream holds one that is sent and one that grows
_SIGNED_SECONDS = 3600
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)  # the caller's counts
_LOCAL_PART_BYTES = 64 * 1024


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    bytes: int


@dataclass(frozen=True)
class Presigned:
    """A URL by which somebody without credentials may do one thing, with these headers, for a time."""

    url: str
    headers: dict[str, str]


class Objects:
    """`signing` is the same store by the name under which clients reach it; `None` where it cannot sign URLs."""

    def __init__(
        self,
        store: ObjectStore,
        signing: "SignCapableStore | None" = None,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        self._store = store
        self._signing = signing
        self._http = http

    @classmethod
    def at(cls, url: str, public_endpoint: str | None = None, http: aiohttp.ClientSession | None = None) -> "Objects":
        """The store at `url`. `public_endpoint` is where clients reach an S3 store, if that is elsewhere.

        With `http`, streams of known size are sent to S3 without being held in memory in parts.
        """
        parts = urlsplit(url)
        if parts.scheme == "file":
            return cls(LocalStore(Path(unquote(parts.path)), automatic_cleanup=True, mkdir=True))
        options: ClientConfig = {"timeout": timedelta(seconds=_CALL_SECONDS), "allow_http": True}
        store = from_url(url, client_options=options)
        signing = from_url(url, client_options=options, endpoint=public_endpoint) if public_endpoint else store
        return cls(store, signing if isinstance(signing, S3Store | GCSStore | AzureStore) else None, http)

    async def presign_put(self, key: str, expires_in: timedelta) -> Presigned | None:
        """By which a client may write `key`, of whatever size; `None` where the store cannot do that."""
        if self._signing is None:
            return None
        headers = {"x-ms-blob-type": "BlockBlob"} if isinstance(self._signing, AzureStore) else {}
        return Presigned(await self._sign("PUT", key, expires_in), headers)

    async def presign_get(self, key: str, expires_in: timedelta) -> str | None:
        """By which a client may read `key`; `None` where the store cannot do that."""
        return None if self._signing is None else await self._sign("GET", key, expires_in)

    async def _sign(self, method: "HTTP_METHOD", key: str, expires_in: timedelta) -> str:
        assert self._signing is not None
        async with _bounded():
            return await obstore.sign_async(self._signing, method, key, expires_in)

    def path(self, key: str) -> Path | None:
        """The file of an object, where the store is a directory."""
        return Path(str(self._store.prefix), key) if isinstance(self._store, LocalStore) else None

    async def put(
        self,
        key: str,
        data: bytes | AsyncIterator[bytes],
        *,
        size: int | None = None,
        content_type: str | None = None,
        seconds: float = _CALL_SECONDS,
    ) -> None:
        """Store `data` under `key`, whole or not at all. A stream is read as it is stored, so its pace counts.

        `size`, where it is known, is that of the stream: S3 needs it to take the stream as it comes, in next to no
        memory. `content_type` is what the store itself answers to who has a presigned URL.
        """
        if size is not None and self._http is not None and isinstance(self._store, S3Store):
            async with _bounded(seconds):
                await self._put_streaming(self._http, self._store, key, data, size)
            return
        local = isinstance(self._store, LocalStore)
        async with _bounded(seconds):
            await obstore.put_async(
                self._store,
                key,
                data,
                attributes={"Content-Type": content_type} if content_type and not local else None,
                chunk_size=_LOCAL_PART_BYTES if local else _PART_BYTES,
                max_concurrency=1,
            )

    @staticmethod
    async def _put_streaming(
        http: aiohttp.ClientSession, store: S3Store, key: str, data: bytes | AsyncIterator[bytes], size: int
    ) -> None:
        url = await obstore.sign_async(store, "PUT", key, timedelta(seconds=_SIGNED_SECONDS))
        headers = {"Content-Length": str(size)}
        try:
            async with http.put(URL(url, encoded=True), data=data, headers=headers, timeout=_NO_TIMEOUT) as answer:
                status = answer.status
        except aiohttp.ClientError as error:
            # What goes wrong with the stream itself is said as that.
            cause = error.__cause__
            raise (
                cause if isinstance(cause, TenfoldError) else Unavailable("the object store is not reachable")
            ) from error
        if status != HTTPStatus.OK:
            raise Unavailable(f"the object store answers {status}")

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

    async def copy(self, source: str, target: str) -> None:
        """The bytes stay in the store. Raises `FileNotFoundError`."""
        async with _bounded():
            await obstore.copy_async(self._store, source, target)

    async def delete(self, *keys: str) -> None:
        """Gone afterwards, whether it was there or not, with what a killed process left of a half-written one.

        On S3 that is an incomplete multipart upload: the bucket's lifecycle rule aborts it.
        """
        async with _bounded():
            for key in keys:
                with suppress(FileNotFoundError):
                    await obstore.delete_async(self._store, key)
                if (path := self.path(key)) is not None:
                    await asyncio.to_thread(_delete_half_written, path)


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
