"""Recipes: what pairs are made of (layer 2).

`Cartoonize` and `Restore` start from photographs, `Import` from pairs that others have published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ipx2p.data.cartoons.teacher import Teacher, open_teacher
from ipx2p.data.degradations.tasks import DegradeConfig, degrade
from ipx2p.data.instructions import bank, has_bank
from ipx2p.data.listing import find_photos
from ipx2p.data.manifest import CAPTIONS, Record
from ipx2p.data.prepare.builder import Made, Recipe, SettingsError, Unit
from ipx2p.data.prepare.fingerprints import fingerprint
from ipx2p.data.prepare.splits import hash_share
from ipx2p.data.published.source import Fault, Source, load_example
from ipx2p.errors import InputError
from ipx2p.files import atomic_write, digest_bytes
from ipx2p.images import image_from_pixels01, load_image, pixels01_from_image, resize, save_image
from ipx2p.seeds import generator

MULTIPLE = 8  # of the sides of new pictures, so that an autoencoder takes them as they are
Banks = dict[str, tuple[str, ...]]  # sentences of tasks, instead of those of the package
Size = tuple[int, int]  # width, height
Stored = tuple[str, str]  # a picture's name below the output folder, and its digest


def sentences(task: str, banks: Banks, own: Sequence[str] = ()) -> Sequence[str]:
    """The instructions that fit a pair; `own` are those of a published set."""
    if task in banks or own:
        return banks.get(task) or own
    if not has_bank(task):
        raise SettingsError(
            f"there are no sentences for the task {task!r}: give some with --bank {task}=FILE"
        )
    return bank(task)


@dataclass(kw_only=True)
class _Common(Recipe):
    """What the recipes share.

    size: the short side that larger pictures are reduced to, in pixels. suffix: of new pictures.
    """

    banks: Banks
    seed: int
    licence: str
    size: int | None
    suffix: str

    def _save(self, image: Image.Image, output: Path, name: str) -> Stored:
        file = f"pictures/{name}.{self.suffix}"
        save_image(image, output / file)
        return file, digest_bytes((output / file).read_bytes())

    def _entry(
        self, task: str, source: Stored, target: Stored, group: str, own: Sequence[str] = (), **more
    ) -> Record:
        files, digests = zip(source, target, strict=True)
        said = sentences(task, self.banks, own)
        return Record(*files, task, said, group, digests=digests, **more)

    def _settings(self, **own: Any) -> dict[str, Any]:
        # Manifests hold all sentences, and training chooses among them.
        wording = {"policy": "per_step", "banks": self.banks}
        return {"size": self.size, "suffix": self.suffix, **own, "wording": wording}


class Photo(NamedTuple):
    """A photograph in memory. name: of its files. digest: of the file's content. split: if set."""

    image: Image.Image
    name: str
    digest: str
    split: str | None


@dataclass(kw_only=True)
class _PhotoRecipe(_Common):
    """Pairs from the photographs of a folder; `count` of them, chosen by their names, or all.

    held_out: names of photographs to validate on; the others are trained on. Empty: by shares.
    """

    folder: Path
    count: int | None
    held_out: Sequence[str]
    device: torch.device

    def units(self) -> list[Unit]:
        photos = find_photos(self.folder)
        if missing := {*self.held_out} - {*map(self._name, photos)}:
            raise InputError(f"--held-out names {', '.join(sorted(missing))}, not in {self.folder}")
        if self.count is not None:
            if self.count > len(photos):
                raise InputError(
                    f"{self.folder} holds {len(photos)} pictures, fewer than --count {self.count}"
                )
            drawn = sorted(photos, key=lambda x: hash_share(self.seed, "photo", self._name(x)))
            photos = sorted(drawn[: self.count])
        return [*map(self._unit, photos)]

    def _name(self, photo: Path) -> str:
        return photo.relative_to(self.folder).as_posix()

    def _unit(self, photo: Path) -> Unit:
        """A photograph as a unit: its name and size, and when it was last modified."""
        try:
            stat = photo.stat()
        except OSError:  # a dangling link: loading it will report it
            return Unit(self._name(photo), photo)
        key = f"{self._name(photo)} ({stat.st_size} bytes)"
        return Unit(key, photo, str(stat.st_mtime_ns))

    def _load(self, path: Path) -> Photo:
        """A photograph, resized."""
        image = load_image(path)
        digest = digest_bytes(path.read_bytes())
        try:
            image = resize(image, _reduced(image.size, self.size))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        split = "val" if self._name(path) in self.held_out else "train"
        split = split if self.held_out else None
        return Photo(image, f"{path.stem}-{digest[:8]}", digest, split)

    def _photo_settings(self, **own: Any) -> dict[str, Any]:
        held_out = {"held_out": [*self.held_out]} if self.held_out else {}
        return self._settings(count=self.count, **held_out, **own)

    def _made(self, photo: Photo, pairs: dict[str, tuple[Stored, Stored]]) -> Made:
        """The pairs of a photograph, by task."""
        group = photo.digest[:16]
        entries = [
            self._entry(task, *pair, group, split=photo.split) for task, pair in pairs.items()
        ]
        prints = {group: fingerprint(photo.image)}
        return Made(entries, prints, megapixels=len(entries) * _megapixels(photo.image))


@dataclass(kw_only=True)
class Cartoonize(_PhotoRecipe):
    """Photographs as sources, their cartoons by a teacher as targets."""

    name = "cartoonize"
    teacher: str

    def __post_init__(self) -> None:
        sentences("cartoonize", self.banks)

    @cached_property
    def _draw(self) -> Teacher:
        """Opened separately by each process."""
        return open_teacher(self.teacher, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_draw"}

    def make(self, unit: Unit, output: Path) -> Made:
        photo = self._load(unit.item)
        cartoon = self._draw(pixels01_from_image(photo.image).to(self.device))
        source = self._save(photo.image, output, f"photos/{photo.name}")
        target = self._save(image_from_pixels01(cartoon.cpu()), output, f"cartoonize/{photo.name}")
        return self._made(photo, {"cartoonize": (source, target)})

    def describe(self) -> dict[str, Any]:
        teacher = {"teacher": Path(self.teacher).name, "digest": self._draw.digest}
        return self._photo_settings(**teacher)


@dataclass(kw_only=True)
class Restore(_PhotoRecipe):
    """Photographs as targets, degraded as sources: every photograph with every task.

    tasks: what the edit has to undo; `derain+denoise` undoes two things. config: how severe.
    """

    name: str
    tasks: Sequence[str]
    config: DegradeConfig

    def __post_init__(self) -> None:
        for task in self.tasks:
            sentences(task, self.banks)

    def make(self, unit: Unit, output: Path) -> Made:
        photo = self._load(unit.item)
        clean = pixels01_from_image(photo.image).to(self.device)
        target = self._save(photo.image, output, f"photos/{photo.name}")
        pairs = {}
        for task in self.tasks:
            draws = generator(self.seed, f"degrade {task} {photo.digest}")
            degraded = image_from_pixels01(degrade(clean, task, draws, self.config).cpu())
            pairs[task] = self._save(degraded, output, f"{task}/{photo.name}"), target
        return self._made(photo, pairs)

    def describe(self) -> dict[str, Any]:
        degradations = {"tasks": self.tasks, "degrade": self.config.of(self.tasks)}
        return self._photo_settings(**degradations)


@dataclass(kw_only=True)
class Import(_Common):
    """Published pairs: their files as they are, or reduced.

    link: make hard links instead of copies, where the file system can.
    """

    name = "import"
    source: Source
    link: bool

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
                source, target = load_example(example)  # whole and of one size, or an error
                size = _reduced(source.size, self.size)
            except InputError as error:
                skipped[example.name] = str(error)
                continue
            stem = f"{example.task}/{example.name}"
            before = self._store(source, example.source, size, output, f"{stem}_source")
            after = self._store(target, example.target, size, output, f"{stem}_target")
            # Names of scenes are the set's own; two sets that share a target share the picture.
            group = f"{self.source.name} {example.group}" if example.group else after[1][:16]
            more = {name: getattr(example, name) for name in ("split", *CAPTIONS)}
            said = example.instructions
            entries.append(self._entry(example.task, before, after, group, said, **more))
            megapixels += _megapixels(source)
            if example.split is None:
                prints[group] = fingerprint(target)
        return Made(entries, prints, skipped, megapixels)

    def _store(
        self, image: Image.Image, content: Path | bytes, size: Size, output: Path, name: str
    ) -> Stored:
        """Write a picture, byte for byte as it is if its size stays."""
        if size != image.size:
            return self._save(resize(image, size), output, name)
        is_file = isinstance(content, Path)
        data = content.read_bytes() if is_file else content
        file = f"pictures/{name}{content.suffix if is_file else _suffix(content)}"
        if not (self.link and is_file and _link(content, output / file)):
            with atomic_write(output / file) as temporary:
                temporary.write_bytes(data)
        return file, digest_bytes(data)

    def describe(self) -> dict[str, Any]:
        return self._settings(source=self.source.name)


def _megapixels(image: Image.Image) -> float:
    return image.width * image.height / 1e6


def _suffix(picture: bytes) -> str:
    """The suffix that belongs to an encoded picture."""
    with Image.open(BytesIO(picture)) as image:
        return {"JPEG": ".jpg", "MPO": ".jpg"}.get(image.format, f".{image.format.lower()}")


def _link(source: Path, path: Path) -> bool:
    """Make a hard link, whole or not there; whether the file system could."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source.resolve())  # the picture, not a link to it
    except OSError:
        return False
    return True


def _reduced(size: Size, short_side: int | None) -> Size:
    """Width and height with at most this short side (None: any), in multiples of `MULTIPLE`.

    Raises: InputError if a side is shorter than that.
    """
    if short_side is None:
        return size
    if min(size) < MULTIPLE:
        raise InputError(f"{size[0]} x {size[1]} pixels, expected at least {MULTIPLE} x {MULTIPLE}")
    short_side = max(1, round(short_side / MULTIPLE)) * MULTIPLE
    scale = min(1.0, short_side / min(size))
    width, height = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in size)
    return width, height
