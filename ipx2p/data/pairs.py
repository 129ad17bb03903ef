"""Pairs of pictures with instructions, and the crop that both pictures share (layer 2)."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.degradations.tasks import DegradeConfig, degrade
from ipx2p.data.instructions import bank
from ipx2p.data.manifest import Manifest, hash64
from ipx2p.errors import InputError
from ipx2p.images import load_image, pixels01_from_pixels_u8, pixels_u8_from_image, resize


@dataclass(frozen=True)
class Geometry:
    """A square crop of a picture: a box in its pixels (left, top, right, bottom), then a flip."""

    box: tuple[float, float, float, float]
    flip: bool
    resolution: int

    def apply(self, image: Image.Image) -> Tensor:
        """The crop, resized to resolution x resolution, as (3, H, W) in [0, 1]."""
        cut = resize(image, (self.resolution, self.resolution), box=self.box)
        pixels_u8 = pixels_u8_from_image(cut)  # mirrored while a pixel has 3 bytes, not 12
        return pixels01_from_pixels_u8(pixels_u8.flip(1) if self.flip else pixels_u8)


def random_geometry(
    size: tuple[int, int],
    resolution: int,
    generator: torch.Generator,
    *,
    max_zoom: float = 1.0,
    flip: bool = True,
) -> Geometry:
    """A random square of a picture, up to `max_zoom` times smaller than its short side."""
    width, height = size
    draws = torch.rand(4, generator=generator).tolist()
    side = min(width, height) / (1 + (max_zoom - 1) * draws[0])
    left, top = draws[1] * (width - side), draws[2] * (height - side)
    return Geometry((left, top, left + side, top + side), flip and draws[3] < 0.5, resolution)


def centre_geometry(size: tuple[int, int], resolution: int) -> Geometry:
    """The largest square in the middle of a picture, for validation."""
    width, height = size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Geometry((left, top, left + side, top + side), False, resolution)


@dataclass(frozen=True)
class EditPair:
    """One training example: two pictures, (3, H, W) in [0, 1], and an instruction."""

    source_pixels01: Tensor
    target_pixels01: Tensor
    instruction: str
    task: str


Cut = Callable[[tuple[int, int]], Geometry]  # size of a picture -> its crop


class Pairs(ABC):
    """A numbered set of pairs."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def task(self, item: int) -> str:
        """The task of this pair."""

    @abstractmethod
    def instructions(self, item: int) -> Sequence[str]:
        """The sentences that fit the pair, at least one."""

    @abstractmethod
    def pictures(self, item: int, cut: Cut, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Source and target, (3, H, W) in [0, 1], cropped by `cut`; `generator` is for degrading.

        Raises: InputError for a picture that cannot be read; it names the file and its origin.
        """

    @abstractmethod
    def files(self, item: int) -> Sequence[Path]:
        """The picture files that the pair is made from."""

    @abstractmethod
    def describe(self, item: int) -> str:
        """The pair's pictures as text: the same text and the same files give the same pictures."""

    def get(self, item: int, cut: Cut, generator: torch.Generator) -> EditPair:
        """The pair as a training example; its instruction is drawn after its pictures."""
        pictures = self.pictures(item, cut, generator)
        return EditPair(*pictures, self.instruction(item, generator), self.task(item))

    def instruction(self, item: int, generator: torch.Generator) -> str:
        """One of the pair's instructions, drawn at random."""
        sentences = self.instructions(item)
        return sentences[int(torch.randint(len(sentences), (), generator=generator))]

    def by_task(self) -> dict[str, np.ndarray]:
        """The numbers of each task's pairs, in order; tasks sorted by name."""
        items: dict[str, list[int]] = {}
        for item in range(len(self)):
            items.setdefault(self.task(item), []).append(item)
        return {task: np.array(items[task]) for task in sorted(items)}

    def digests(self) -> np.ndarray:
        """A hash of each pair's pictures, which does not depend on its number, (N,) uint64."""
        return _digests([self.describe(item)] for item in range(len(self)))

    def sentence_digests(self) -> np.ndarray:
        """A hash of each pair's instructions, (N,) uint64."""
        return _digests(self.instructions(item) for item in range(len(self)))


class ManifestPairs(Manifest, Pairs):
    """The pairs of a manifest. InputError names the file and line of any mistake in it."""

    def instructions(self, item: int) -> Sequence[str]:
        return self[item].instructions

    def pictures(self, item: int, cut: Cut, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        source_path, target_path = self.files(item)
        try:
            source, target = load_image(source_path), load_image(target_path)
            if source.size != target.size:
                raise InputError(
                    f"{source_path} is {source.width} x {source.height}, {target_path} is "
                    f"{target.width} x {target.height}: a pair must have one size"
                )
            geometry = cut(source.size)
        except InputError as error:
            raise InputError(f"{self.where(item)}: {error}") from None
        return geometry.apply(source), geometry.apply(target)

    def files(self, item: int) -> Sequence[Path]:
        record = self[item]
        return self.path.parent / record.source, self.path.parent / record.target

    def describe(self, item: int) -> str:
        record = self[item]
        return json.dumps([*map(os.path.normpath, record[:2]), record.task])

    def by_task(self) -> dict[str, np.ndarray]:
        order = np.argsort(self.index.task_ids, kind="stable")
        counts = np.bincount(self.index.task_ids)
        items = np.split(order, counts.cumsum()[:-1])
        return dict(sorted(zip(self.tasks, items, strict=True)))

    def digests(self) -> np.ndarray:
        return self.index.pictures

    def sentence_digests(self) -> np.ndarray:
        return self.index.sentences


class DegradedPhotos(Pairs):
    """Photographs as targets, degraded on the fly as sources: every photo with every task.

    Args:
        tasks: what the edit has to undo, keys of `DEGRADATIONS`.
        config: how severe the degradations are.
    """

    def __init__(self, photos: Sequence[Path], tasks: Sequence[str], config: DegradeConfig) -> None:
        self.photos = [*photos]
        self.tasks = [*tasks]
        self.config = config
        self._cache = PictureCache()

    def __len__(self) -> int:
        return len(self.photos) * len(self.tasks)

    def task(self, item: int) -> str:
        return self.tasks[item % len(self.tasks)]

    def instructions(self, item: int) -> Sequence[str]:
        return bank(self.task(item))

    def pictures(self, item: int, cut: Cut, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        [photo] = self.files(item)
        image = self._cache.load(photo)
        target = cut(image.size).apply(image)
        return degrade(target, self.task(item), generator, self.config), target

    def files(self, item: int) -> Sequence[Path]:
        return (self.photos[item // len(self.tasks)],)

    def describe(self, item: int) -> str:
        [photo] = self.files(item)
        task = self.task(item)
        return json.dumps([photo.name, task, self.config.of([task])])


class PictureCache:
    """Loads pictures, and keeps the first ones that fit into a budget of decoded bytes."""

    def __init__(self, budget: int = 256 * 2**20) -> None:
        self.free = budget
        self.images: dict[Path, Image.Image] = {}

    def load(self, path: Path) -> Image.Image:
        """The picture at `path`."""
        if path in self.images:
            return self.images[path]
        image = load_image(path)
        num_bytes = 3 * image.width * image.height
        if num_bytes <= self.free:
            self.free -= num_bytes
            self.images[path] = image
        return image


def _digests(texts: Iterable[Sequence[str]]) -> np.ndarray:
    return np.frombuffer(b"".join(map(hash64, texts)), np.uint64)
