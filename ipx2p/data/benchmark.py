"""Benchmark of reading pairs: pairs per second for numbers of worker processes (layer 2).

It times the stream of training, from two files to a batch in memory. The numbers of workers take
turns, so that other load on the machine affects all of them.
"""

import os
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image

from ipx2p import __version__
from ipx2p.data.loader import Framing, SampleStream, StepSampler
from ipx2p.data.manifest import Record
from ipx2p.data.pairs import ManifestPairs
from ipx2p.data.workers import micro_batches
from ipx2p.devices import device_name
from ipx2p.errors import InputError
from ipx2p.images import image_from_pixels01
from ipx2p.seeds import generator

NUM_PAIRS, SIDE = 32, 512  # of made-up pairs
QUALITY = 90  # of their JPEG files
MAX_ZOOM = 1.125  # as `data.max_zoom`


class Turn(NamedTuple):
    """The time of one turn in seconds: on the clock, and summed over the cores that worked."""

    elapsed_s: float
    cpu_s: float


def benchmark_loading(
    manifest: str | None,
    *,
    workers: Sequence[int],
    resolution: int,
    batch_size: int,
    batches: int,
    turns: int,
    command: str,
) -> None:
    """Read batches of pairs with each number of workers, and print a row for each.

    Args:
        manifest: pairs to read; None makes some up.
        batches: read in each turn.
        command: as it was typed.
    """
    check_counts(resolution=resolution, batch_size=batch_size, batches=batches, turns=turns)
    if min(workers) < 0:
        raise InputError(f"--workers is {min(workers)}, expected 0 or more")
    done: dict[int, list[Turn]] = {count: [] for count in workers}
    with tempfile.TemporaryDirectory(prefix="ipx2p-bench-") as folder:
        pairs = ManifestPairs(manifest or write_pairs(Path(folder)))
        stream = SampleStream(pairs, Framing(resolution, max_zoom=MAX_ZOOM), seed=0)
        what = manifest or f"made-up JPEG pictures, {SIDE} px"
        print(
            f"{versions()}\nmachine: {os.cpu_count()} cores of {device_name(torch.device('cpu'))}\n"
            f"pairs: {len(pairs)} pairs of {what}\ncommand: {command}\n"
            f"turn: {batches} batches of {batch_size}, {resolution} px",
            flush=True,
        )
        measure(stream, 1, batch_size, 0)  # now the files are in memory, if they fit
        for index in range(turns):
            for count, found in done.items():
                found.append(measure(stream, batches, batch_size, count))
                rate = batches * batch_size / found[-1].elapsed_s
                print(f"turn {1 + index} of {turns}: {count} workers: {rate:.4g} pairs/s")
    print(f"{'workers':<8}{'pairs/s':>9}{'fastest':>9}{'per worker':>12}{'per core':>10}")
    for count, found in done.items():
        middle = Turn(*map(median, zip(*found, strict=True)))
        times = (middle.elapsed_s, min(found).elapsed_s, middle.elapsed_s * max(1, count))
        # Pairs per CPU second come last: other programs hardly change them.
        rates = [batches * batch_size / time_s for time_s in (*times, middle.cpu_s)]
        print("{:<8}{:>9.4g}{:>9.4g}{:>12.4g}{:>10.4g}".format(count, *rates))


def check_counts(**counts: int) -> None:
    """Raise InputError for an option that is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")


def versions() -> str:
    """A line about the software that is measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("Pillow", "transformers"))
    python = platform.python_version()
    return f"versions: ipx2p {__version__}, python {python}, torch {torch.__version__}, {packages}"


def measure(stream: SampleStream, batches: int, batch_size: int, workers: int) -> Turn:
    """Read batches; starting the workers counts too, since they read ahead meanwhile."""
    since, cpu_since = time.perf_counter(), cpu_seconds()
    sampler = StepSampler(range(batches), batch_size)
    with closing(micro_batches(stream, sampler, workers=workers)) as read:
        for _ in read:
            elapsed_s = time.perf_counter() - since
    return Turn(elapsed_s, cpu_seconds() - cpu_since)


def write_pairs(folder: Path, count: int = NUM_PAIRS, side: int = SIDE) -> Path:
    """Write made-up pairs as JPEG files, and the manifest that lists them."""
    manifest = folder / "pairs.jsonl"
    with manifest.open("w") as file:
        for pair in range(count):
            names = (f"source_{pair}.jpg", f"target_{pair}.jpg")
            for name in names:
                picture = random_picture(side, generator(0, f"benchmark {name}"))
                picture.save(folder / name, quality=QUALITY)
            file.write(Record(*names, "benchmark", [f"edit number {pair}"]).line() + "\n")
    return manifest


def random_picture(side: int, draws: torch.Generator) -> Image.Image:
    """A random picture whose amplitudes fall with frequency like those of photographs (Field 1987),
    a little faster, so that its JPEG file is as large as that of a photograph."""
    noise = torch.randn(2, side, side, generator=draws)
    frequency = torch.fft.fftfreq(side)[:, None].hypot(torch.fft.rfftfreq(side)).clamp(min=1 / side)
    fields = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency**1.3)
    grey, tint = fields / fields.std(dim=(1, 2), keepdim=True)
    return image_from_pixels01(0.5 + 0.2 * grey + 0.05 * torch.stack((tint, 0 * tint, -tint)))


def cpu_seconds() -> float:
    """CPU seconds of this process and of its child processes that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
