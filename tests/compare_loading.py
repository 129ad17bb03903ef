"""Compare how fast pairs are read here and with the packages that most training scripts use.

    pip install datasets && python tests/compare_loading.py

The other pipeline is Hugging Face `datasets` (its Image feature and `with_transform`), torchvision
and a torch DataLoader, as training scripts of diffusers have it. Both do the same work: two JPEG
files of 512 x 512 are decoded, the same random square of both is resized with the same filter and
perhaps mirrored, and a batch holds both as float32 in [-1, 1], in the same number of processes.
The two take turns in one process, on the same pictures.
"""

import argparse
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import datasets
import PIL
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ipx2p.data.benchmark import MAX_ZOOM, Turn, cpu_seconds, measure, write_pairs
from ipx2p.data.loader import Framing, SampleStream
from ipx2p.data.pairs import ManifestPairs
from ipx2p.devices import device_name


def open_other(manifest: Path, resolution: int) -> datasets.Dataset:
    """The pairs of a manifest as a data set that gives tensors."""
    columns = ["source", "target"]
    rows = datasets.load_dataset("json", data_files=str(manifest), split="train")
    rows = rows.map(lambda row: {name: str(manifest.parent / row[name]) for name in columns})
    for name in columns:
        rows = rows.cast_column(name, datasets.Image(mode="RGB"))

    def transform(rows: dict) -> dict:
        pairs = [cut(pair, resolution) for pair in zip(*map(rows.get, columns), strict=True)]
        return dict(zip(columns, zip(*pairs, strict=True), strict=True)) | {
            name: rows[name] for name in ("instruction", "task")
        }

    return rows.with_transform(transform)


def cut(pair: tuple[PIL.Image.Image, ...], resolution: int) -> list[torch.Tensor]:
    """The same random square of both pictures, perhaps mirrored, (3, H, W) in [-1, 1]."""
    zoom, x, y, mirrored = torch.rand(4).tolist()
    width, height = pair[0].size
    side = round(min(width, height) / (1 + (MAX_ZOOM - 1) * zoom))
    top, left = math.floor(y * (height - side)), math.floor(x * (width - side))
    results = []
    for picture in pair:
        picture = functional.resized_crop(
            picture, top, left, side, side, [resolution] * 2, InterpolationMode.LANCZOS
        )
        picture = functional.horizontal_flip(picture) if mirrored < 0.5 else picture
        pixels01 = functional.to_dtype(functional.to_image(picture), torch.float32, scale=True)
        results.append(functional.normalize(pixels01, [0.5] * 3, [0.5] * 3))
    return results


def collate(rows: list[dict]) -> dict:
    """Rows -> a batch."""
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    return batch | {name: torch.stack(batch[name]) for name in ("source", "target")}


def measure_other(rows: datasets.Dataset, batches: int, batch_size: int, workers: int) -> Turn:
    """Read batches, as `measure` does."""
    since, cpu_since = time.perf_counter(), cpu_seconds()
    order = (torch.arange(batches * batch_size) % len(rows)).tolist()
    loader = DataLoader(rows, batch_size, sampler=order, collate_fn=collate, num_workers=workers)
    for batch in loader:
        assert batch["source"].shape[:2] == batch["target"].shape[:2] == (batch_size, 3)
        elapsed_s = time.perf_counter() - since
    del loader
    return Turn(elapsed_s, cpu_seconds() - cpu_since)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Compare with Hugging Face datasets, in turns.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    sizes = (args.batches, args.batch_size)
    print(
        f"versions: python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, Pillow {PIL.__version__}, datasets {datasets.__version__}\n"
        f"machine: {device_name(torch.device('cpu'))}\ncommand: python {' '.join(sys.argv)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_pairs(Path(folder))
        framing = Framing(args.resolution, max_zoom=MAX_ZOOM)
        ours = SampleStream(ManifestPairs(manifest), framing, seed=0)
        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = folder
        other = open_other(manifest, args.resolution)
        measure(ours, 1, args.batch_size, 0)
        measure_other(other, 1, args.batch_size, 0)
        print("medians over the turns, pairs/s; per core: for each second that a core has worked")
        columns = [
            f"{kind}{how}" for how in ("", ", per core") for kind in ("ipx2p", "datasets", "ratio")
        ]
        print("workers " + "".join(f"{column:>20}" for column in columns))
        for workers in args.workers:
            turns = []
            for index in range(args.turns):  # both come first in half of them
                first = measure(ours, *sizes, workers) if index % 2 else None
                theirs = measure_other(other, *sizes, workers)
                turns.append((first or measure(ours, *sizes, workers), theirs))
            row = f"{workers:<8}"
            for name in ("elapsed_s", "cpu_s"):
                seconds = [[getattr(turn, name) for turn in both] for both in turns]
                rates = [math.prod(sizes) / median(part) for part in zip(*seconds, strict=True)]
                ratio = median(theirs / mine for mine, theirs in seconds)
                row += "".join(f"{value:>20.4g}" for value in (*rates, ratio))
            print(row, flush=True)


if __name__ == "__main__":
    main()
