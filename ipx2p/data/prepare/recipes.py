"""Recipes: what pairs are made of (layer 2).

`Cartoonize` and `Restore` start from photographs, `Import` from pairs that others have published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ipx2p.data.cartoons.teacher import Teacher, open_teacher
from ipx2p.data.degradations.tasks import DegradeConfig, degrade
from ipx2p.data.instructions import bank, has_bank
from ipx2p.data.listing import find_photos
from ipx2p.data.manifest import Record
from ipx2p.data.prepare.builder import Made, Recipe, SettingsError, Unit
from ipx2p.data.prepare.fingerprints import fingerprint
from ipx2p.data.prepare.splits import hash_share
from ipx2p.data.published.source import Example, Fault, Source, load_example
from ipx2p.errors import InputError
from ipx2p.files import atomic_write, digest_bytes
from ipx2p.images import (
    image_from_pixels01,
    load_image,
    pixels01_from_image,
    resize,
    save_image,
)
from ipx2p.seeds import generator

MULTIPLE = 8  # of the sides of new pictures, so that an autoencoder takes them as they are


Banks = dict[str, tuple[str, ...]]  # sentences of tasks, instead of those of the package


def sentences(task: str, banks: Banks, own: Sequence[str] = ()) -> Sequence[str]:
    """What may be said of a pair; `own` is what a published set says of it."""
    if task in banks or own:
        return banks.get(task) or own
    if not has_bank(task):
        raise SettingsError(
            f"there are no sentences for the task {task!r}: give some with --bank {task}=FILE"
        )
    return bank(task)


@dataclass
class Photos:
    """Photographs as the input of a recipe.

    size: their short side afterwards, in pixels; smaller ones are not enlarged. count: how many to
    draw, by their names; None takes all. suffix: of the pictures that are made.
    """

    folder: Path
    size: int = 512
    count: int | None = None
    suffix: str = "png"

    def units(self, seed: int) -> list[Unit]:
        """A unit for each photograph, sorted by name."""
        photos = find_photos(self.folder)
        if self.count is not None:
            if self.count > len(photos):
                raise InputError(
                    f"{self.folder} holds {len(photos)} pictures, fewer than --count {self.count}"
                )
            name = {photo: photo.relative_to(self.folder).as_posix() for photo in photos}
            drawn = sorted(photos, key=lambda photo: hash_share(seed, "photo", name[photo]))
            photos = sorted(drawn[: self.count])
        return [_unit(photo, self.folder) for photo in photos]

    def load(self, path: Path) -> "Photo":
        """A photograph, resized."""
        image = load_image(path)
        digest = digest_bytes(path.read_bytes())
        try:
            image = resize(image, _reduced(image.size, self.size))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return Photo(image, f"{path.stem}-{digest[:8]}", digest)

    def describe(self) -> dict[str, Any]:
        """The settings that affect the result."""
        return {"size": self.size, "count": self.count, "suffix": self.suffix}


@dataclass(frozen=True)
class Photo:
    """A photograph in memory. name: of its files. digest: of the file's content."""

    image: Image.Image
    name: str
    digest: str

    @property
    def megapixels(self) -> float:
        """Its size in millions of pixels."""
        return self.image.width * self.image.height / 1e6


class _PhotoRecipe(Recipe):
    """The parts shared by recipes that start from photographs."""

    def __init__(self, photos: Photos, banks: Banks, *, seed: int, licence: str) -> None:
        self.photos = photos
        self.banks = banks
        self.seed = seed
        self.licence = licence

    def units(self) -> list[Unit]:
        return self.photos.units(self.seed)

    def _save(self, image: Image.Image, output: Path, folder: str, photo: Photo) -> tuple[str, str]:
        """Write a picture; returns its name below the output folder, and its digest."""
        name = f"pictures/{folder}/{photo.name}.{self.photos.suffix}"
        save_image(image, output / name)
        return name, digest_bytes((output / name).read_bytes())

    def _entry(
        self, task: str, photo: Photo, source: tuple[str, str], target: tuple[str, str]
    ) -> Record:
        files, digests = zip(source, target, strict=True)
        said = sentences(task, self.banks)
        return Record(*files, task, said, photo.digest[:16], digests=digests)


class Cartoonize(_PhotoRecipe):
    """Photographs as sources, their cartoons by a teacher as targets."""

    name = "cartoonize"

    def __init__(
        self,
        photos: Photos,
        banks: Banks,
        *,
        seed: int,
        licence: str,
        teacher: str,
        device: torch.device,
    ) -> None:
        super().__init__(photos, banks, seed=seed, licence=licence)
        sentences("cartoonize", banks)
        self.teacher_name = teacher
        self.device = device
        self._described = {"teacher": Path(teacher).name, "digest": self.teacher.digest}

    @cached_property
    def teacher(self) -> Teacher:
        """Opened separately by each process."""
        return open_teacher(self.teacher_name, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "teacher"}

    def make(self, unit: Unit, output: Path) -> Made:
        photo = self.photos.load(unit.item)
        with torch.inference_mode():
            cartoon = self.teacher(pixels01_from_image(photo.image)[None].to(self.device))[0]
        source = self._save(photo.image, output, "photos", photo)
        target = self._save(image_from_pixels01(cartoon.cpu()), output, "cartoonize", photo)
        entry = self._entry("cartoonize", photo, source, target)
        prints = {entry.group: fingerprint(photo.image)}
        return Made([entry], prints, megapixels=photo.megapixels)

    def describe(self) -> dict[str, Any]:
        return {**self.photos.describe(), **self._described, "wording": _wording(self.banks)}


class Restore(_PhotoRecipe):
    """Photographs as targets, degraded as sources: every photograph with every task.

    Args:
        tasks: what the edit has to undo; `derain+denoise` undoes two things at once.
        config: how severe the degradations are.
    """

    def __init__(
        self,
        photos: Photos,
        banks: Banks,
        *,
        seed: int,
        licence: str,
        name: str,
        tasks: Sequence[str],
        config: DegradeConfig,
        device: torch.device,
    ) -> None:
        super().__init__(photos, banks, seed=seed, licence=licence)
        for task in tasks:
            sentences(task, banks)
        self.name = name
        self.tasks = [*tasks]
        self.config = config
        self.device = device

    def make(self, unit: Unit, output: Path) -> Made:
        photo = self.photos.load(unit.item)
        clean = pixels01_from_image(photo.image).to(self.device)
        target = self._save(photo.image, output, "photos", photo)
        entries = []
        for task in self.tasks:
            degraded = self._degrade(clean, task, photo)
            source = self._save(image_from_pixels01(degraded.cpu()), output, task, photo)
            entries.append(self._entry(task, photo, source, target))
        prints = {entries[0].group: fingerprint(photo.image)}
        return Made(entries, prints, megapixels=photo.megapixels * len(entries))

    def _degrade(self, clean: Tensor, task: str, photo: Photo) -> Tensor:
        draws = generator(self.seed, f"degrade {task} {photo.digest}")
        return degrade(clean, task, draws, self.config)

    def describe(self) -> dict[str, Any]:
        settings = {"tasks": self.tasks, "degrade": self.config.of(self.tasks)}
        return {**self.photos.describe(), **settings, "wording": _wording(self.banks)}


class Import(Recipe):
    """Published pairs: their files as they are, or reduced.

    Args:
        source: where the pairs come from.
        size: the short side of larger pictures afterwards, in pixels; None leaves the files alone.
        link: make hard links instead of copies, where the file system can.
    """

    name = "import"

    def __init__(
        self,
        source: Source,
        banks: Banks,
        *,
        seed: int,
        licence: str,
        size: int | None = None,
        suffix: str = "png",
        link: bool = False,
    ) -> None:
        self.source = source
        self.banks = banks
        self.seed = seed
        self.licence = licence or source.licence
        self.size = size
        self.suffix = suffix
        self.link = link

    def units(self) -> list[Unit]:
        units = []
        for chunk in self.source.chunks():
            faults = (item.reason for item in chunk.items if isinstance(item, Fault))
            units.append(Unit(chunk.key, chunk, faults=(*faults,)))
        return units

    def make(self, unit: Unit, output: Path) -> Made:
        entries, prints, skipped, megapixels = [], {}, {}, 0.0
        for example in self.source.read(unit.item):
            if isinstance(example, Fault):
                skipped[example.name] = example.reason
                continue
            try:
                pictures = load_example(example)  # whole and of one size, or an error
                size = pictures[0].size
                sides = _reduced(size, self.size) if self.size else size
            except InputError as error:
                skipped[example.name] = str(error)
                continue
            contents = (example.source, example.target)
            files = [
                self._store(picture, content, sides, output, f"{example.name}_{role}", example.task)
                for role, picture, content in zip(("source", "target"), pictures, contents,
                                                  strict=True)
            ]  # fmt: skip
            entry = self._entry(example, *files)
            entries.append(entry)
            megapixels += pictures[0].width * pictures[0].height / 1e6
            if example.split is None:
                prints[entry.group] = fingerprint(pictures[1])
        return Made(entries, prints, skipped, megapixels)

    def _store(
        self,
        picture: Image.Image,
        content: Path | bytes,
        sides: tuple[int, int],
        output: Path,
        name: str,
        task: str,
    ) -> tuple[str, str]:
        """Write one picture of a pair; its name below the output folder and its digest."""
        stem = f"pictures/{task}/{name}"
        if sides != picture.size:
            file = f"{stem}.{self.suffix}"
            save_image(resize(picture, sides), output / file)
            return file, digest_bytes((output / file).read_bytes())
        data = content if isinstance(content, bytes) else content.read_bytes()
        file = stem + (_suffix(content) if isinstance(content, bytes) else content.suffix)
        if not (self.link and isinstance(content, Path) and _link(content, output / file)):
            with atomic_write(output / file) as temporary:
                temporary.write_bytes(data)
        return file, digest_bytes(data)

    def _entry(self, example: Example, source: tuple[str, str], target: tuple[str, str]) -> Record:
        said = sentences(example.task, self.banks, example.instructions)
        files, digests = zip(source, target, strict=True)
        # Names of scenes are the set's own; two sets that share a target share the picture.
        group = f"{self.source.name} {example.group}" if example.group else digests[1][:16]
        return Record(*files, example.task, said, group, example.source_caption,
                      example.target_caption, example.split, digests)  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """See `Recipe.describe`."""
        picture = {"size": self.size, "suffix": self.suffix}
        return {"source": self.source.name, **picture, "wording": _wording(self.banks)}


def _wording(banks: Banks) -> dict[str, Any]:
    """For the settings; manifests hold all sentences, and training chooses among them."""
    return {"policy": "per_step", "banks": banks}


def _suffix(picture: bytes) -> str:
    """The suffix that belongs to an encoded picture."""
    with Image.open(BytesIO(picture)) as image:
        return {"JPEG": ".jpg", "MPO": ".jpg"}.get(image.format, f".{image.format.lower()}")


def _link(source: Path, path: Path) -> bool:
    """Make a hard link, whole or not there; whether the file system could."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source)
    except OSError:
        return False
    return True


def _reduced(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Width and height with at most this short side, in multiples of `MULTIPLE`.

    Raises: InputError if a side is shorter than that.
    """
    if min(size) < MULTIPLE:
        raise InputError(f"{size[0]} x {size[1]} pixels, expected at least {MULTIPLE} x {MULTIPLE}")
    scale = min(1.0, short_side / min(size))
    width, height = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in size)
    return width, height


def _unit(photo: Path, folder: Path) -> Unit:
    """A photograph as a unit: its name and size, and when it was last modified."""
    name = photo.relative_to(folder).as_posix()
    try:
        stat = photo.stat()
    except OSError:  # a dangling link: loading it will report it
        return Unit(name, photo)
    return Unit(f"{name} ({stat.st_size} bytes)", photo, str(stat.st_mtime_ns))
