"""Pairs of pictures with an instruction: the manifest, and the geometry both share (layer 2).

A manifest is JSON lines, one pair each, paths relative to the file, one instruction or a list:
{"source": "a.png", "target": "b.png", "instruction": "derain the image", "task": "derain"}
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.degrade import DegradeConfig, check_task, degrade
from ipx2p.data.instructions import bank
from ipx2p.errors import InputError
from ipx2p.images import load_image, pixels01_from_image, resize

PICTURES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Geometry:
    """One square cut of a picture: a box in its pixels (left, top, right, bottom), then a flip."""

    box: tuple[float, float, float, float]
    flip: bool
    resolution: int

    def apply(self, image: Image.Image) -> Tensor:
        """The cut, resized to resolution x resolution, as (3, H, W) in [0, 1]."""
        cut = resize(image, (self.resolution, self.resolution), box=self.box)
        pixels01 = pixels01_from_image(cut)
        return pixels01.flip(-1) if self.flip else pixels01


def random_geometry(
    size: tuple[int, int],
    resolution: int,
    generator: torch.Generator,
    *,
    max_zoom: float = 1.0,
    flip: bool = True,
) -> Geometry:
    """A random square of a picture: aspect kept, up to `max_zoom` smaller than its short side."""
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
    """One training example: two pictures, (3, H, W) in [0, 1], and what to say."""

    source_pixels01: Tensor
    target_pixels01: Tensor
    instruction: str
    task: str


Cut = Callable[[tuple[int, int]], Geometry]  # size of a picture -> what to take of it


class Pairs(ABC):
    """A numbered set of pairs."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def task(self, item: int) -> str:
        """The task of the pair of this number, without looking at its pictures."""

    @abstractmethod
    def instructions(self, item: int) -> Sequence[str]:
        """What may be said of the pair, at least one sentence."""

    @abstractmethod
    def pictures(self, item: int, cut: Cut, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Source and target, (3, H, W) in [0, 1], cut by `cut`; the generator makes all that is
        random in them.

        Raises: InputError for a picture that cannot be read, naming the file and its origin.
        """

    @abstractmethod
    def files(self, item: int) -> Sequence[Path]:
        """The picture files that the pair is made from."""

    @abstractmethod
    def describe(self, item: int) -> str:
        """The pair's pictures in a line: equal lines and equal files make equal pictures."""

    def get(self, item: int, cut: Cut, generator: torch.Generator) -> EditPair:
        """The pair of this number; of several instructions one is drawn, after the pictures."""
        pictures = self.pictures(item, cut, generator)
        return EditPair(*pictures, self.instruction(item, generator), self.task(item))

    def instruction(self, item: int, generator: torch.Generator) -> str:
        """One of the pair's instructions."""
        sentences = self.instructions(item)
        return sentences[int(torch.randint(len(sentences), (), generator=generator))]


class ManifestPairs(Pairs):
    """The pairs of a manifest. InputError names the file and line of whatever is wrong in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records = read_manifest(self.path)

    def __len__(self) -> int:
        return len(self.records)

    def task(self, item: int) -> str:
        """See `Pairs.task`."""
        return self.records[item].task

    def instructions(self, item: int) -> Sequence[str]:
        """See `Pairs.instructions`."""
        return self.records[item].instructions

    def pictures(self, item: int, cut: Cut, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Pairs.pictures`."""
        record = self.records[item]
        try:
            source, target = load_image(record.source), load_image(record.target)
            if source.size != target.size:
                raise InputError(
                    f"{record.source} is {source.width} x {source.height}, {record.target} is "
                    f"{target.width} x {target.height}: a pair must have one size"
                )
            geometry = cut(source.size)
        except InputError as error:
            raise InputError(f"{self.path} line {record.line}: {error}") from None
        return geometry.apply(source), geometry.apply(target)

    def files(self, item: int) -> Sequence[Path]:
        """See `Pairs.files`."""
        return self.records[item].source, self.records[item].target

    def describe(self, item: int) -> str:
        """See `Pairs.describe`."""
        record = self.records[item]
        folder = self.path.parent
        names = [os.path.relpath(path, folder) for path in (record.source, record.target)]
        return json.dumps([*names, record.task])


class DegradedPhotos(Pairs):
    """Photographs as targets, degraded on the fly as sources: every photo with every task.

    Args:
        photos: picture files.
        tasks: what the edit has to undo, keys of `DEGRADATIONS`.
        config: how severe the degradations are.
    """

    def __init__(self, photos: Sequence[Path], tasks: Sequence[str], config: DegradeConfig) -> None:
        for task in tasks:
            check_task(task, "data.tasks")
        self.photos = [*photos]
        self.tasks = [*tasks]
        self.config = config
        self._cache = PictureCache()

    def __len__(self) -> int:
        return len(self.photos) * len(self.tasks)

    def task(self, item: int) -> str:
        """See `Pairs.task`."""
        return self.tasks[item % len(self.tasks)]

    def instructions(self, item: int) -> Sequence[str]:
        """See `Pairs.instructions`."""
        return (bank(self.task(item))[0],)

    def pictures(self, item: int, cut: Cut, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Pairs.pictures`."""
        [photo] = self.files(item)
        image = self._cache.load(photo)
        target = cut(image.size).apply(image)
        return degrade(target, self.task(item), generator, self.config), target

    def files(self, item: int) -> Sequence[Path]:
        """See `Pairs.files`."""
        return (self.photos[item // len(self.tasks)],)

    def describe(self, item: int) -> str:
        """See `Pairs.describe`."""
        [photo] = self.files(item)
        return json.dumps([photo.name, self.task(item), asdict(self.config)])


class PictureCache:
    """Loads pictures and keeps the first ones that fit into a budget of decoded bytes."""

    def __init__(self, budget: int = 256 * 2**20) -> None:
        self.free = budget
        self.images: dict[Path, Image.Image] = {}

    def load(self, path: Path) -> Image.Image:
        """The picture at `path`, see `load_image`."""
        if path in self.images:
            return self.images[path]
        image = load_image(path)
        num_bytes = 3 * image.width * image.height
        if num_bytes <= self.free:
            self.free -= num_bytes
            self.images[path] = image
        return image


@dataclass(frozen=True)
class Record:
    """One line of a manifest."""

    source: Path
    target: Path
    instructions: tuple[str, ...]
    task: str
    line: int


def read_manifest(path: Path) -> list[Record]:
    """Read a manifest whole. InputError names the file, the line, and what is wrong in it."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"manifest {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read manifest {path}: {error}") from error
    records = [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InputError(f"manifest {path} lists no pairs")
    return records


def find_photos(folder: Path) -> list[Path]:
    """The picture files in a folder and its subfolders, in order of their names.

    Raises: InputError when there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of photographs")
    photos = [folder / name for name in picture_names(folder)]
    if not photos:
        raise InputError(f"{folder} holds no pictures, expected {', '.join(sorted(PICTURES))}")
    return photos


def picture_names(folder: Path) -> list[str]:
    """The picture files below a folder, see `file_names`."""
    return file_names(folder, PICTURES)


def file_names(folder: Path, suffixes: Container[str]) -> list[str]:
    """The files of some suffixes below a folder: relative paths with "/", sorted by their parts.

    Raises: InputError for a folder that cannot be read.
    """
    names: list[str] = []
    prefixes = [""]
    while prefixes:
        prefix = prefixes.pop()
        for name, is_folder in scan(folder / prefix).items():
            if is_folder:
                prefixes.append(f"{prefix}{name}/")
            elif os.path.splitext(name)[1].lower() in suffixes:
                names.append(prefix + name)
    return sorted(names, key=lambda name: name.split("/"))


def scan(folder: Path) -> dict[str, bool]:
    """The names in a folder, in no order, and which of them are folders.

    Without what macOS and others hide there, and without a look at each file.
    Raises: InputError when it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_dir() for entry in entries if not _is_hidden(entry.name)}
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _record(path: Path, number: int, line: str) -> Record:
    where = f"{path} line {number}"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} holds a {type(values).__name__}, expected an object")
    for name in ("source", "target", "task"):
        if not isinstance(values.get(name), str) or not values[name]:
            raise InputError(f"{where}: {name!r} is {values.get(name)!r}, expected a string")
    instruction = values.get("instruction")
    instructions = instruction if isinstance(instruction, list) else [instruction]
    if not instructions or not all(isinstance(i, str) and i.strip() for i in instructions):
        raise InputError(
            f"{where}: 'instruction' is {instruction!r}, expected a sentence or a list of sentences"
        )
    if any(not text.isascii() and not is_unicode(text) for text in instructions):
        raise InputError(f"{where}: 'instruction' is not valid Unicode text: {instruction!a}")
    source, target = (path.parent / values[name] for name in ("source", "target"))
    return Record(source, target, tuple(instructions), values["task"], number)


def is_unicode(text: str) -> bool:
    """Whether the text can be written down: JSON can name halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
