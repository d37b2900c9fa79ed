import shutil
from pathlib import Path

import pytest

from shared.errors import Unavailable
from shared.objects import Objects


async def test_a_store_that_fails_is_unavailable_and_what_is_not_there_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    objects = Objects.at(folder.as_uri())
    await objects.put("one", b"x")
    assert await objects.get("one") == b"x"
    assert await objects.head("none") is None
    with pytest.raises(FileNotFoundError):
        await objects.get("none")
    shutil.rmtree(folder)
    folder.write_text("a file where the store's folder was")
    for call in (objects.get("one"), objects.put("two", b"x"), objects.head("one"), objects.delete("one")):
        with pytest.raises(Unavailable):
            await call
