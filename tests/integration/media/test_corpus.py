"""What becomes of each file of the hostile corpus, by the same child process, which lives through all of them."""

import asyncio
import collections
import functools
from pathlib import Path

import psutil
import pytest

from services.media.children import CannotProcess, Children
from services.media.content_types import sniff
from tests.integration.media import corpus, images
from tests.integration.media.conftest import World
from tests.integration.media.corpus import Case
from tests.integration.media.test_children import _limits, _running
from tests.integration.media.test_shown import composed

CASES = list(corpus.cases())


@functools.cache
def data_of(name: str) -> bytes:
    return next(case for case in CASES if case.name == name).data()


async def _outcome(children: Children, folder: Path, case: Case) -> str:
    data = data_of(case.name)
    content_type = sniff(data)
    if content_type is None:
        return "refused"
    source = folder / "original"
    source.write_bytes(data)
    try:
        processed = await children.process(source, folder, content_type)
    except CannotProcess as error:
        return error.code if error.reason else "no reason"
    if case.size is not None:
        assert (processed.width, processed.height) == case.size
    if processed.shown is not None:
        made = composed(data, processed.shown)
        assert images.size(made) == images.size(data)
        assert not any(mark in made for mark in (b"<script", b"<?php", b"PK\x03\x04")), case.name
    for variant in processed.variants:
        made = (folder / f"{variant.name}.webp").read_bytes()
        assert images.size(made) == (variant.width, variant.height)
        assert not images.metadata(made)
        assert not any(mark in made for mark in (b"<script", b"<?php", b"PK\x03\x04"))
    return "ready"


async def test_the_corpus(tmp_path: Path) -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
    wrong, outcomes = [], collections.Counter[str]()
    async with Children.opened(_limits(max_animation_pixels=corpus.ANIMATION_PIXELS)) as children:
        first: list[psutil.Process] = []
        for case in CASES:
            outcome = await _outcome(children, tmp_path, case)
            outcomes[outcome] += 1
            if outcome not in case.expected.split("|"):
                wrong.append(f"{case.name}: {outcome}, not {case.expected}")
            first = first or _running()
        assert not wrong
        assert _running() == first  # no file has cost the child its life
        peak = first[0].memory_info().rss
    print(f"{len(CASES)} files: {dict(outcomes)}; resident afterwards {peak / 2**20:.0f} MiB")


@pytest.mark.parametrize("kind", ["gif", "webp"])
async def test_what_moves_moves_still(tmp_path: Path, kind: str) -> None:
    import pyvips

    (tmp_path / "original").write_bytes(corpus.animation(5, 900, 450).write_to_buffer(f".{kind}"))
    async with Children.opened(_limits()) as children:
        processed = await children.process(tmp_path / "original", tmp_path, f"image/{kind}")
    assert (processed.width, processed.height) == (900, 450)
    assert [(v.name, v.width, v.height) for v in processed.variants] == [
        ("small", 256, 128),
        ("medium", 640, 320),
        ("large", 900, 450),
        ("animated", 640, 320),
    ]
    pages = {
        v.name: pyvips.Image.new_from_file(str(tmp_path / f"{v.name}.webp")).get("n-pages")
        for v in processed.variants
        if v.name == "animated"
    }
    assert pages == {"animated": 5}
    moving = pyvips.Image.new_from_file(str(tmp_path / "animated.webp"), n=-1)
    assert (moving.get("delay"), moving.get("page-height")) == ([40] * 5, 320)


async def test_through_the_api(world: World) -> None:
    """All of them, several at a time: refused at the door, failed with a reason, or ready; the worker lives on."""
    places = asyncio.Semaphore(8)

    async def becomes(case: Case) -> str:
        async with places:
            status, media, _ = await world.upload(data_of(case.name), "image/jpeg")  # whatever it says it is
            if status in (415, 422):
                return "refused"
            assert status == 202, case.name
            media = await world.settled(media["id"])
        assert bool(media["failure"]) == (media["status"] == "failed"), case.name
        return str(media["status"])

    outcomes = await asyncio.gather(*(becomes(case) for case in CASES))
    codes_are_failures = {"ready": "ready", "refused": "refused"}
    for case, outcome in zip(CASES, outcomes, strict=True):
        expected = {codes_are_failures.get(code, "failed") for code in case.expected.split("|")}
        assert outcome in expected, case.name
    good = await world.settled((await world.uploaded(images.photo(300, 200)))["id"])
    assert good["status"] == "ready"
