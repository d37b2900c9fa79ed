"""`make bench-media`: what an image costs, beside decoding alone, the `vipsthumbnail` command and Pillow, in one run.

A 12-megapixel JPEG becomes three WebP files of quality 80. CPU time is that of the processes that do it, so that other
work on the machine counts little; each is the least of several rounds. Writes `bench/results/media.md`.

`vipsthumbnail` and Pillow are for comparison only; `bench/setup.sh` installs them.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyvips

from services.media.imaging import Job, Limits, Made, Refused
from services.media.models import VARIANTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "media.md"
PILLOW_PYTHON = ROOT / "bench" / ".venv" / "bin" / "python"
ROUNDS = 7
WIDTH, HEIGHT = 4000, 3000

_DECODE = "import pyvips, sys; pyvips.Image.new_from_file(sys.argv[1], access='sequential').copy_memory()"
_NOTHING = "import pyvips"
_PILLOW = """
import sys, resource
from PIL import Image, ImageOps
source, target = sys.argv[1:3]
for size in map(int, sys.argv[3:]):
    image = ImageOps.exif_transpose(Image.open(source))
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=None)
    image.save(f"{target}/{size}.webp", quality=80)
"""


@dataclass
class Row:
    """CPU seconds an image, bytes of the three files, SSIM of the largest, peak memory of a process."""

    name: str
    cpu: float
    bytes: int | None = None
    ssim: float | None = None
    peak: float | None = None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "photo.jpg")
        _make_photo(source)
        reference = pyvips.Image.new_from_file(str(source)).resize(VARIANTS["large"] / WIDTH, kernel="lanczos3")
        rows = _rows(source, Path(folder), reference)
        size = source.stat().st_size
    text = _report(rows, size)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)


def _rows(source: Path, folder: Path, reference: Any) -> list[Row]:
    rows = [_ours(source, folder / "ours", reference)]
    bare, _ = _command([sys.executable, "-c", _NOTHING])
    decoding, peak = _command([sys.executable, "-c", _DECODE, str(source)])
    rows.append(Row("decoding alone", decoding - bare, peak=peak))
    rows.append(_vipsthumbnail(source, folder / "command", reference))
    rows.append(_pillow(str(PILLOW_PYTHON), source, folder / "pillow", reference))
    return rows


def _ours(source: Path, target: Path, reference: Any) -> Row:
    """The worker's child process, as it is; many images one after the other."""
    target.mkdir()
    limits = msgspec.json.encode(Limits(50_000_000, 100_000_000, 2**30)).decode()
    with subprocess.Popen(
        [sys.executable, "-m", "services.media.imaging", limits],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        job = msgspec.json.encode(Job(str(source), str(target), "image/jpeg")) + b"\n"
        process = psutil.Process(child.pid)
        spent = []
        for _ in range(ROUNDS + 1):
            before = process.cpu_times()
            child.stdin.write(job)
            child.stdin.flush()
            answer = msgspec.json.decode(child.stdout.readline(), type=Made | Refused)
            after = process.cpu_times()
            spent.append(after.user + after.system - before.user - before.system)
        assert isinstance(answer, Made), answer
        peak = _peak(child.pid)
        child.stdin.close()
    made = [target / f"{name}.webp" for name in VARIANTS]
    cpu = sum(sorted(spent[1:])[: ROUNDS // 2 + 1]) / (ROUNDS // 2 + 1)  # the clock ticks in 10 ms
    return Row("tenfold", cpu, _bytes(made), _ssim(reference, target / "large.webp"), peak)


def _vipsthumbnail(source: Path, target: Path, reference: Any) -> Row:
    target.mkdir()
    cpu, peak = 0.0, 0.0
    for name, size in VARIANTS.items():
        output = f"{target}/{name}.webp[Q=80,strip]"
        one, memory = _command(["vipsthumbnail", str(source), "--size", f"{size}x{size}>", "-o", output])
        cpu, peak = cpu + one, max(peak, memory)
    made = [target / f"{name}.webp" for name in VARIANTS]
    return Row("vipsthumbnail, three times", cpu, _bytes(made), _ssim(reference, target / "large.webp"), peak)


def _pillow(python: str, source: Path, target: Path, reference: Any) -> Row:
    target.mkdir()
    bare, _ = _command([python, "-c", "import PIL.Image, PIL.ImageOps"])
    sizes = [str(size) for size in VARIANTS.values()]
    cpu, peak = _command([python, "-c", _PILLOW, str(source), str(target), *sizes])
    made = [target / f"{size}.webp" for size in sizes]
    return Row("Pillow", cpu - bare, _bytes(made), _ssim(reference, made[-1]), peak)


def _command(command: list[str]) -> tuple[float, float]:
    """The least CPU seconds and the peak MiB of a command that is run several times, on one thread."""
    environ = {**os.environ, "VIPS_CONCURRENCY": "1"}
    spent, peak = [], 0.0
    for _ in range(ROUNDS):
        pid = os.posix_spawnp(command[0], command, environ)
        _, status, usage = os.wait4(pid, 0)
        assert status == 0, command
        spent.append(usage.ru_utime + usage.ru_stime)
        peak = max(peak, usage.ru_maxrss / 1024)
    return min(spent), peak


def _peak(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _make_photo(target: Path) -> None:
    """Large shapes, texture and the noise of a sensor, about as compressible as a photo with much detail."""
    light: Any = 128
    for size, strength in ((800, 60), (160, 35), (40, 25), (12, 20), (5, 12)):
        light += pyvips.Image.perlin(WIDTH, HEIGHT, cell_size=size, seed=size) * strength
    noise = pyvips.Image.gaussnoise(WIDTH, HEIGHT, sigma=4, seed=1).gaussblur(0.7)
    bands = (light + noise).bandjoin([light.fliphor() + noise, light.flipver() + noise])
    bands.cast("uchar").copy(interpretation="srgb").jpegsave(str(target), Q=90)


def _ssim(reference: Any, made: Path) -> float:
    """Of the luminance, with the usual gaussian window of sigma 1.5 (Wang et al. 2004)."""
    x, y = (_luminance(image) for image in (reference, pyvips.Image.new_from_file(str(made))))

    def blur(image: Any) -> Any:
        return image.gaussblur(1.5, precision="float")

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = ((mx * my * 2 + c1) * (cov * 2 + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    mean: float = index.avg()
    return mean


def _luminance(image: Any) -> Any:
    return (image.extract_band(0, n=3) * [0.299, 0.587, 0.114]).bandmean() * 3


def _report(rows: list[Row], size: int) -> str:
    ours = rows[0]
    pixels = ", ".join(map(str, VARIANTS.values()))
    versions = f"libvips {pyvips.version(0)}.{pyvips.version(1)} in the worker, {_command_version()} in the command"
    lines = [
        "# Images: CPU, size, likeness, memory",
        "",
        f"A JPEG of {WIDTH} x {HEIGHT}, {size / 1e6:.1f} MB, to WebP of {pixels} pixels, quality 80. {versions}.",
        "",
        "| | CPU, ms | images/s a core | against tenfold | bytes out | SSIM of `large` | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        out = f"{row.bytes:,}" if row.bytes else ""
        likeness = f"{row.ssim:.4f}" if row.ssim else ""
        peak = f"{row.peak:.0f}" if row.peak else ""
        lines.append(
            f"| {row.name} | {row.cpu * 1000:.0f} | {1 / row.cpu:.1f} | {row.cpu / ours.cpu:.2f}"
            f" | {out} | {likeness} | {peak} |"
        )
    by_name = {row.name: row for row in rows}
    decoding = ours.cpu / by_name["decoding alone"].cpu
    lines += ["", f"- {decoding:.2f} times the decoding alone (goal: at most 2.2)"]
    faster = by_name["vipsthumbnail, three times"].cpu / ours.cpu
    lines.append(f"- {faster:.2f} times as fast as `vipsthumbnail` (goal: 2.5)")
    lines.append(f"- {ours.peak:.0f} MiB in a process at most (goal: under 120 MB)")
    return "\n".join(lines) + "\n"


def _command_version() -> str:
    return subprocess.run(
        ["vipsthumbnail", "--vips-version"], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
