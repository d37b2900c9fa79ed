"""Uploads on their way in: sniffed, counted, hashed."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest

from services.media.blobs import Intake
from services.media.errors import EmptyUpload, NotAnImage, UploadTimeout
from shared.errors import TooLarge

PNG = b"\x89PNG\r\n\x1a\n" + bytes(200)


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_hands_on_what_it_looked_at() -> None:
    intake = Intake(_chunks(*(PNG[i : i + 1] for i in range(len(PNG)))), 1000, 1)
    assert await intake.sniff() == "image/png"
    assert b"".join([chunk async for chunk in intake]) == PNG
    assert intake.bytes == len(PNG)
    assert intake.sha256() == hashlib.sha256(PNG).hexdigest()


async def test_a_short_image_is_enough_to_tell() -> None:
    intake = Intake(_chunks(PNG[:10]), 1000, 1)
    assert await intake.sniff() == "image/png"
    assert [chunk async for chunk in intake] == [PNG[:10]]


async def test_refuses_nothing_and_something_else() -> None:
    with pytest.raises(EmptyUpload):
        await Intake(_chunks(), 1000, 1).sniff()
    with pytest.raises(NotAnImage):
        await Intake(_chunks(b"<svg/>"), 1000, 1).sniff()


async def test_stops_at_the_limit() -> None:
    exact = Intake(_chunks(PNG), len(PNG), 1)
    await exact.sniff()
    assert [chunk async for chunk in exact] == [PNG]
    over = Intake(_chunks(PNG, b"x"), len(PNG), 1)
    await over.sniff()
    with pytest.raises(TooLarge):
        [chunk async for chunk in over]


async def test_does_not_wait_for_ever() -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield PNG
        await asyncio.Event().wait()

    intake = Intake(stalling(), 1000, 0.01)
    await intake.sniff()
    with pytest.raises(UploadTimeout):
        [chunk async for chunk in intake]
