"""The program that makes variants, run as a child process so that it can be killed: `python -m services.media.imaging`.

Its one argument is `Limits` as JSON. It says when it is ready. Then each line on standard input is a `Job`, answered by
a line on standard output: `Made` or `Refused`. It ends when standard input does. It imports nothing of the platform, to
start fast and stay small, and takes only files, so that nothing large goes through pipes.
"""

import base64
import ctypes
import hashlib
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from services.media.models import ANIMATED, ANIMATED_LONGEST, VARIANTS, Processed, Variant
from services.media.shown import shown

_LOADERS = {
    "image/jpeg": "jpegload",
    "image/png": "pngload",
    "image/webp": "webpload",
    "image/gif": "gifload",
    "image/avif": "heifload",
}
_QUALITY = 80
_EFFORT = 2  # of 6: half the time of the default and files 5 % larger
_PLACEHOLDER_PIXELS = 16
_NICE = 5  # the loop that feeds the children goes first
_PR_SET_PDEATHSIG = 1

READY = b"ready\n"  # the first line it writes


class Limits(msgspec.Struct, frozen=True):
    max_pixels: int
    max_animation_pixels: int
    memory_bytes: int


class Job(msgspec.Struct, frozen=True):
    """Make the variants of the file `source` in the folder `target`, as `<name>.webp`."""

    source: str
    target: str
    content_type: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The image cannot be processed: a code for programs, a reason for people."""

    code: str
    reason: str


class Made(msgspec.Struct, frozen=True, tag=True):
    processed: Processed


def make_variants(job: Job, limits: Limits) -> Made | Refused:
    """Raises nothing: whatever libvips says is an answer."""
    import pyvips  # only here: the worker itself, which imports this module too, needs no libvips

    try:
        header = pyvips.Image.new_from_file(job.source, access="sequential", fail_on="error")
        if header.get("vips-loader") != _LOADERS[job.content_type]:
            return Refused("damaged", "the file is not what it says it is")
        pixels = header.width * header.height
        if pixels > limits.max_pixels:
            return _too_many("image", pixels, limits.max_pixels)
        if _frames(header) > 1 and pixels * _frames(header) > limits.max_animation_pixels:
            return _too_many("animation", pixels * _frames(header), limits.max_animation_pixels)
        return Made(_made(pyvips, job, header))
    except pyvips.Error as error:
        return Refused("damaged", f"the file is damaged or incomplete ({_first_line(error, job)})")
    except MemoryError:
        return Refused("out-of-memory", "the image takes too much memory")


def _too_many(what: str, pixels: int, most: int) -> Refused:
    return Refused("too-many-pixels", f"the {what} has {pixels / 1e6:.1f} megapixels, at most {most / 1e6:g} are taken")


def _frames(header: Any) -> int:
    """Of an animation; pages of other kinds are not for us."""
    moves = header.get("vips-loader") in ("gifload", "webpload") and header.get_typeof("n-pages")
    return int(header.get("n-pages")) if moves else 1


def _made(pyvips: Any, job: Job, header: Any) -> Processed:
    width, height = header.width, header.height
    orientation = header.get("orientation") if header.get_typeof("orientation") else 1
    if orientation >= 5:
        width, height = height, width  # turned by a quarter
    # One decode, shrunk on the way where the format can, and turned upright. Each variant is made from the next larger
    # one: a third less work than three times from the original, and no visible difference.
    names = sorted(VARIANTS, key=VARIANTS.__getitem__, reverse=True)
    longest = VARIANTS[names[0]]
    shrunk = pyvips.Image.thumbnail(job.source, longest, height=longest, size="down", fail_on="error").copy_memory()
    image = _in_srgb(pyvips, shrunk)
    variants = []
    for name in names:
        image = _fitted(image, VARIANTS[name])
        variants.append(_saved(job, name, image, image.height))
    tiny = _fitted(image, _PLACEHOLDER_PIXELS).webpsave_buffer(Q=50, effort=_EFFORT, keep="none")
    placeholder = f"data:image/webp;base64,{base64.b64encode(tiny).decode()}"
    variants.reverse()
    if _frames(header) > 1:
        # Frame by frame from the decoder to the encoder: never all of them in memory.
        moving = pyvips.Image.thumbnail(
            f"{job.source}[n=-1]",
            ANIMATED_LONGEST,
            height=ANIMATED_LONGEST,
            size="down",
            output_profile="srgb",
            fail_on="error",
        )
        variants.append(_saved(job, ANIMATED, moving, moving.get("page-height")))
    visible = shown(Path(job.source), job.content_type, orientation)
    return Processed(width, height, placeholder, tuple(variants), visible)


def _saved(job: Job, name: str, image: Any, height: int) -> Variant:
    """As WebP. `height` is that of one frame."""
    data = image.webpsave_buffer(Q=_QUALITY, effort=_EFFORT, keep="none")
    Path(job.target, f"{name}.webp").write_bytes(data)
    return Variant(name, image.width, height, len(data), hashlib.sha256(data).hexdigest())


def _in_srgb(pyvips: Any, image: Any) -> Any:
    """Colours by the embedded profile. On what is shrunk already: before, it took 170 ms of a 12-megapixel photo."""
    if image.get_typeof("icc-profile-data"):
        try:
            return image.icc_transform("srgb", embedded=True, input_profile="srgb", depth=8).copy_memory()
        except pyvips.Error:
            pass  # a profile that is broken or of another kind of image: the colours as they are
    return image if image.interpretation in ("srgb", "b-w") else image.colourspace("srgb").copy_memory()


def _fitted(image: Any, longest: int) -> Any:
    if max(image.width, image.height) <= longest:
        return image
    return image.thumbnail_image(longest, height=longest, size="down").copy_memory()


def _first_line(error: Any, job: Job) -> str:
    """For its owner, whom our paths do not concern."""
    lines = [line.strip() for line in str(error.detail).splitlines() if line.strip()]
    return lines[0].replace(f"{job.target}/", "")[:200] if lines else "no details"


def _confine(limits: Limits) -> None:
    """Before libvips is loaded: bound the memory, be nice, and die with the worker."""
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["VIPS_CONCURRENCY"] = "1"  # as many images at a time as processes
    import pyvips

    pyvips.block_untrusted_set(True)
    pyvips.cache_set_max(0)


def main() -> None:
    limits = msgspec.json.decode(sys.argv[1], type=Limits)
    _confine(limits)
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        answer = make_variants(msgspec.json.decode(line, type=Job), limits)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
