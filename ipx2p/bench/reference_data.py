"""Reading pairs as most training scripts do: Hugging Face `datasets`, torchvision, a DataLoader.

The same work as ours (layer 5): two JPEG files are decoded, the same random square of both is
resized with the same filter and perhaps mirrored, and a batch holds both as float32 in [-1, 1]. The
only file that knows `datasets`; it is imported for `--against datasets` alone.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ipx2p.errors import InputError

try:
    import datasets
except ImportError as error:
    raise InputError('datasets is not installed: pip install -e ".[bench]"') from error


def reader(
    manifest: Path,
    cache: Path,
    *,
    resolution: int,
    max_zoom: float,
    batch_size: int,
    batches: int,
    workers: int,
) -> Callable[[], None]:
    """A call that reads batches of the pairs of a manifest. cache: a folder for its tables."""
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = str(cache)
    columns = ["source", "target"]
    rows = datasets.load_dataset("json", data_files=str(manifest), split="train")
    rows = rows.map(lambda row: {name: str(manifest.parent / row[name]) for name in columns})
    for name in columns:
        rows = rows.cast_column(name, datasets.Image(mode="RGB"))

    def transform(rows: dict) -> dict:
        pairs = zip(*map(rows.get, columns), strict=True)
        pairs = [cut(pair, resolution, max_zoom) for pair in pairs]
        return dict(zip(columns, zip(*pairs, strict=True), strict=True)) | {
            name: rows[name] for name in ("instruction", "task")
        }

    rows = rows.with_transform(transform)
    order = (torch.arange(batches * batch_size) % len(rows)).tolist()

    def read() -> None:
        for _ in DataLoader(
            rows, batch_size, sampler=order, collate_fn=collate, num_workers=workers
        ):
            pass

    return read


def cut(pair: tuple[Image.Image, ...], resolution: int, max_zoom: float) -> list[torch.Tensor]:
    """The same random square of both pictures, perhaps mirrored, (3, H, W) in [-1, 1]."""
    zoom, x, y, mirrored = torch.rand(4).tolist()
    width, height = pair[0].size
    side = round(min(width, height) / (1 + (max_zoom - 1) * zoom))
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
