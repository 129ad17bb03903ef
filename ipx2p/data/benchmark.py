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
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import PIL
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


@dataclass(frozen=True)
class Turn:
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
    sizes = {"--resolution": resolution, "--batch-size": batch_size, "--batches": batches}
    for name, value in (sizes | {"--turns": turns}).items():
        if value < 1:
            raise InputError(f"{name} is {value}, expected 1 or more")
    if min(workers) < 0:
        raise InputError(f"--workers is {min(workers)}, expected 0 or more")
    with tempfile.TemporaryDirectory(prefix="ipx2p-bench-") as folder:
        pairs = ManifestPairs(manifest or write_pairs(Path(folder)))
        stream = SampleStream(pairs, Framing(resolution, max_zoom=MAX_ZOOM), seed=0)
        what = manifest or f"made-up JPEG pictures, {SIDE} px"
        print(header(f"{len(pairs)} pairs of {what}", command))
        print(f"turn: {batches} batches of {batch_size}, {resolution} px", flush=True)
        measure(stream, 1, batch_size, 0)  # now the files are in memory, if they fit
        done: dict[int, list[Turn]] = {count: [] for count in workers}
        for index in range(turns):
            for count, found in done.items():
                found.append(measure(stream, batches, batch_size, count))
                rate = batches * batch_size / found[-1].elapsed_s
                print(f"turn {1 + index} of {turns}: {count} workers: {rate:.4g} pairs/s")
        print(table(done, batches * batch_size))


def measure(stream: SampleStream, batches: int, batch_size: int, workers: int) -> Turn:
    """Read batches; starting the workers counts too, since they read ahead meanwhile."""
    since, cpu_since = time.perf_counter(), cpu_seconds()
    sampler = StepSampler(range(batches), batch_size)
    with closing(micro_batches(stream, sampler, workers=workers)) as read:
        for _ in read:
            elapsed_s = time.perf_counter() - since
    return Turn(elapsed_s, cpu_seconds() - cpu_since)


def header(what: str, command: str) -> str:
    """What is measured, on which machine, and the command that repeats it."""
    return (
        f"versions: ipx2p {__version__}, python {platform.python_version()}, "
        f"torch {torch.__version__}, Pillow {PIL.__version__}\n"
        f"machine: {os.cpu_count()} cores of {device_name(torch.device('cpu'))}\n"
        f"pairs: {what}\ncommand: {command}"
    )


def table(done: dict[int, list[Turn]], count: int) -> str:
    """Medians over the turns of each number of workers.

    per core: pairs per CPU second, which other programs hardly change.
    """
    lines = [f"{'workers':<8}{'pairs/s':>9}{'fastest':>9}{'per worker':>12}{'per core':>10}"]
    for workers, turns in done.items():
        rate = count / median(turn.elapsed_s for turn in turns)
        fastest = count / min(turn.elapsed_s for turn in turns)
        per_core = count / median(turn.cpu_s for turn in turns)
        per_worker = rate / max(1, workers)
        lines.append(f"{workers:<8}{rate:>9.4g}{fastest:>9.4g}{per_worker:>12.4g}{per_core:>10.4g}")
    return "\n".join(lines)


def write_pairs(folder: Path) -> Path:
    """Write made-up pairs as JPEG files, and the manifest that lists them."""
    manifest = folder / "pairs.jsonl"
    with manifest.open("w") as file:
        for pair in range(NUM_PAIRS):
            names = [f"{role}_{pair}.jpg" for role in ("source", "target")]
            for role, name in zip(("source", "target"), names, strict=True):
                picture = random_picture(SIDE, generator(0, f"benchmark {role}", pair))
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
