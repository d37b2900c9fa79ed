"""The child processes: what comes of good, hostile and unlucky images."""

import asyncio
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest

from services.media.children import CannotProcess, Children
from services.media.settings import Settings
from shared.errors import Unavailable
from shared.testing import eventually
from tests.integration.media import images


def _limits(processes: int = 1, **changes: float) -> Settings:
    own = Settings(
        database_url="", object_store_url="", url_secret="s" * 32, jwks_url="", processes=processes
    )  # what the children do not need is empty
    return msgspec.structs.replace(own, **changes)


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "original"
    path.write_bytes(data)
    return path


def _running() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "services.media.imaging" in child.cmdline():
                found.append(child)
    return found


async def test_variants_are_never_enlarged(tmp_path: Path) -> None:
    async with Children.opened(_limits()) as children:
        processed = await children.process(_file(tmp_path, images.photo(300, 200)), tmp_path, "image/jpeg")
    assert [(v.name, v.width, v.height) for v in processed.variants] == [
        ("small", 256, 171),
        ("medium", 300, 200),
        ("large", 300, 200),
    ]
    assert [images.size((tmp_path / f"{v.name}.webp").read_bytes()) for v in processed.variants] == [
        (v.width, v.height) for v in processed.variants
    ]
    assert not _running()


async def test_colours_are_brought_to_srgb(tmp_path: Path) -> None:
    async with Children.opened(_limits()) as children:
        await children.process(_file(tmp_path, images.in_cmyk()), tmp_path, "image/jpeg")
    assert images.difference((tmp_path / "large.webp").read_bytes(), images.photo(300, 200)) < 6


async def test_much_metadata_is_no_answer_too_long(tmp_path: Path) -> None:
    """What stands for it where it is blanked out comes with the answer."""
    async with Children.opened(_limits()) as children:
        processed = await children.process(_file(tmp_path, images.with_xmp(60_000)), tmp_path, "image/avif")
    assert processed.shown is not None
    assert sum(len(piece) for piece in processed.shown.pieces if isinstance(piece, bytes)) > 60_000


async def test_what_answers_nonsense_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _file(tmp_path, images.with_xmp(60_000))
    monkeypatch.setattr("services.media.children._ANSWER_BYTES", 1024)  # less than the answer
    async with Children.opened(_limits()) as children:
        with pytest.raises(CannotProcess) as caught:
            await children.process(source, tmp_path, "image/avif")
        assert caught.value.code == "out-of-memory"


@pytest.mark.parametrize(
    ("data", "content_type", "code"),
    [
        (images.photo(300, 200)[:2000], "image/jpeg", "damaged"),
        (images.photo(300, 200)[:100], "image/jpeg", "damaged"),
        (images.photo(300, 200, "png")[:2000], "image/png", "damaged"),
        (images.photo(300, 200, "webp")[:1000], "image/webp", "damaged"),
        (images.photo(300, 200, "avif")[:1000], "image/avif", "damaged"),
        (b"\xff\xd8\xff" + bytes(100), "image/jpeg", "damaged"),
        (images.photo(300, 200, "png"), "image/jpeg", "damaged"),  # not what its first bytes were taken for
        (b"nonsense", "image/png", "damaged"),
        (images.bomb(), "image/png", "too-many-pixels"),
    ],
    ids=["half-jpeg", "head-jpeg", "half-png", "half-webp", "half-avif", "zeros", "other-type", "nonsense", "bomb"],
)
async def test_a_bad_image_is_refused_with_a_reason(tmp_path: Path, data: bytes, content_type: str, code: str) -> None:
    async with Children.opened(_limits()) as children:
        with pytest.raises(CannotProcess) as caught:
            await children.process(_file(tmp_path, data), tmp_path, content_type)
        assert caught.value.code == code
        assert caught.value.reason
        assert str(tmp_path) not in caught.value.reason
        child = _running()
        await children.process(_file(tmp_path, images.photo(300, 200)), tmp_path, "image/jpeg")
        assert _running() == child  # the child has survived it


async def test_a_child_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    source = _file(tmp_path, images.photo(6000, 4000, "png"))
    async with Children.opened(_limits(process_seconds=0.3)) as children:
        with pytest.raises(CannotProcess) as caught:
            await children.process(source, tmp_path, "image/png")
        assert caught.value.code == "timeout"
        assert not _running()


async def test_a_child_that_takes_too_much_memory_takes_nobody_along(tmp_path: Path) -> None:
    source = _file(tmp_path, images.photo(6000, 4000, "avif"))
    async with Children.opened(_limits(process_memory_bytes=400 * 2**20)) as children:
        with pytest.raises(CannotProcess) as caught:
            await children.process(source, tmp_path, "image/avif")
        assert caught.value.code in ("out-of-memory", "damaged")
        await children.process(_file(tmp_path, images.photo(300, 200)), tmp_path, "image/jpeg")


async def test_an_idle_child_that_was_killed_is_replaced(tmp_path: Path) -> None:
    source = _file(tmp_path, images.photo(300, 200))
    async with Children.opened(_limits()) as children:
        await children.process(source, tmp_path, "image/jpeg")
        (child,) = _running()
        child.kill()
        await children.process(source, tmp_path, "image/jpeg")
        assert _running() != [child]


async def test_an_image_that_kills_two_children_is_given_up(tmp_path: Path) -> None:
    source = _file(tmp_path, images.photo(6000, 4000, "png"))
    async with Children.opened(_limits()) as children:
        killed: set[int] = set()
        processing = asyncio.create_task(children.process(source, tmp_path, "image/png"))

        async def kill_next() -> bool:
            for child in _running():
                with suppress(psutil.Error):
                    if any(file.path == str(source) for file in child.open_files()):  # at work on it
                        child.kill()
                        killed.add(child.pid)
            return len(killed) == 2

        await eventually(kill_next, every=0.01)
        with pytest.raises(CannotProcess) as caught:
            await processing
        assert caught.value.code == "out-of-memory"
        await children.process(_file(tmp_path, images.photo(300, 200)), tmp_path, "image/jpeg")


async def test_none_is_left_of_who_is_still_at_work_at_the_end(tmp_path: Path) -> None:
    """The event waits for another worker: that this one ended is no image's fault."""
    source = _file(tmp_path, images.photo(6000, 4000, "png"))

    async def both_run() -> bool:
        return len(_running()) == 2

    async with Children.opened(_limits(processes=2)) as children:
        busy = [asyncio.create_task(children.process(source, tmp_path, "image/png")) for _ in range(3)]
        await eventually(both_run, every=0.01)
    ended = await asyncio.gather(*busy, return_exceptions=True)
    assert [type(error) for error in ended] == [Unavailable] * 3
    assert not _running()


async def test_waits_when_children_do_not_start(tmp_path: Path) -> None:
    source = _file(tmp_path, images.photo(300, 200))
    async with Children.opened(_limits(process_memory_bytes=30 * 2**20)) as children:
        with pytest.raises(Unavailable):
            await children.process(source, tmp_path, "image/jpeg")
        assert not _running()


async def test_a_child_does_not_know_the_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "secret")
    async with Children.opened(_limits()) as children:
        await children.process(_file(tmp_path, images.photo(300, 200)), tmp_path, "image/jpeg")
        (child,) = _running()
        assert "DATABASE_URL" not in child.environ()


async def test_as_many_at_a_time_as_processes(tmp_path: Path) -> None:
    source = _file(tmp_path, images.photo(1600, 1200))
    async with Children.opened(_limits(processes=2)) as children:
        await asyncio.gather(*(children.process(source, tmp_path, "image/jpeg") for _ in range(6)))
        assert len(_running()) == 2
        with pytest.raises(TimeoutError):  # cancelled in the middle
            async with asyncio.timeout(0.01):
                await children.process(source, tmp_path, "image/jpeg")
        assert len(_running()) == 1
    assert not _running()
