"""Published pairs in parallel folders, as their sets are unpacked (layer 2).

One class for each set; its docstring is the layout, and errors print it. The sets have no
sentences, and their splits are those of the publication.
"""

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from ipx2p.data.listing import picture_names
from ipx2p.data.published.source import (
    Chunk,
    Example,
    Options,
    Source,
    chunked,
    is_unicode,
    stem,
    subfolders,
)
from ipx2p.errors import InputError, suggestion
from ipx2p.files import digest_bytes

_GLANCE = 20  # sequences that `fits` looks at


@dataclass(frozen=True)
class Part:
    """Two parallel folders that belong to one split; `name` begins the names of their pairs."""

    name: str
    source: Path
    target: Path
    split: str | None


def by_key(pictures: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Pictures by what pairs them. InputError for two of one key, or one that is not Unicode."""
    found: dict[str, Path] = {}
    for key, path in pictures:
        if key in found:
            raise InputError(f"{found[key]} and {path} would be one picture: remove one of them")
        if not is_unicode(key):
            raise InputError(
                f"the name of {str(path)!a} is not valid Unicode text: rename the file"
            )
        found[key] = path
    return found


def check_matched(
    sources: dict[str, Path], targets: dict[str, Path], folders: tuple[Path, Path]
) -> None:
    """Raise InputError unless both have the same keys: it names a picture of each side alone."""
    faults = []
    sides = ((sources, targets, "target", folders[1]), (targets, sources, "source", folders[0]))
    for ours, theirs, other, folder in sides:
        if alone := [path for key, path in ours.items() if key not in theirs]:
            number = f" (so {len(alone)} of {len(ours)})" if len(alone) > 1 else ""
            faults.append(f"{alone[0]} has no {other} in {folder}{number}")
    if faults:
        raise InputError(f"{'; '.join(faults)}: fetch what is missing, or correct the names")


class ParallelFolders(Source):
    """Sources and targets in parallel folders, under the same names but for the suffixes."""

    task: ClassVar[str | None] = None
    depth: ClassVar[int | None] = 0  # folders between the parallel ones and the pictures; None: any

    @abstractmethod
    def parts(self) -> list[Part]:
        """The parallel folders of the set."""

    def group(self, name: str) -> str:
        """What the pair of this name must stay together with; "": with its own target only."""
        return ""

    def chunks(self) -> list[Chunk]:
        """See `Source.chunks`."""
        self.check_root()
        return chunked([x for part in self.parts() for x in self._examples(part)])

    def read(self, chunk: Chunk) -> Iterator[Example]:
        """See `Source.read`."""
        yield from chunk.items

    def _examples(self, part: Part) -> Iterator[Example]:
        sources, targets = self._pictures(part.source), self._pictures(part.target)
        check_matched(sources, targets, (part.source, part.target))
        task = self.asked.task or self.task
        for key in sources:
            name = f"{part.name}/{key}" if part.name else key
            group = self.group(name)
            yield Example(name, sources[key], targets[key], (), task, part.split, group)

    def _pictures(self, folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            raise InputError(f"folder {folder} is missing, expected {self.layout}")
        names = picture_names(folder)
        if not names:
            raise InputError(f"{folder} holds no pictures, expected {self.layout}")
        for name in names:
            if self.depth not in (None, name.count("/")):
                raise InputError(f"{folder / name} lies at another depth, expected {self.layout}")
        return by_key((stem(name), folder / name) for name in names)


class Reds(ParallelFolders):
    """[train/]train_blur/000/00000000.png with [train/]train_sharp/000/00000000.png, and
    [val/]val_blur with [val/]val_sharp likewise.
    """

    name = "reds"
    licence = "CC BY 4.0 to our knowledge; see the set's page"
    task = "deblur"
    depth = 1

    def fits(self, folder: Path) -> bool:
        """See `Source.fits`."""
        return bool(_reds_parts(folder))

    def parts(self) -> list[Part]:
        """See `ParallelFolders.parts`."""
        return _reds_parts(self.folder)

    def group(self, name: str) -> str:
        """The sequence."""
        return name.rpartition("/")[0]


def _reds_parts(folder: Path) -> list[Part]:
    parts = []
    for split in ("train", "val"):
        for root in (folder, folder / split):
            blur, sharp = root / f"{split}_blur", root / f"{split}_sharp"
            if blur.is_dir() or sharp.is_dir():
                parts.append(Part(split, blur, sharp, split))
                break
    return parts


class GoPro(ParallelFolders):
    """train/GOPR0372_07_00/blur/000047.png with train/GOPR0372_07_00/sharp/000047.png, and test
    likewise; blur_gamma is not read.
    """

    name = "gopro"
    licence = "CC BY 4.0 to our knowledge; see the set's page"
    task = "deblur"

    def fits(self, folder: Path) -> bool:
        """See `Source.fits`."""
        return any(
            (split / name / "sharp").is_dir()
            for split in (folder / "train", folder / "test")
            if split.is_dir()
            for name in subfolders(split)[:_GLANCE]
        )

    def parts(self) -> list[Part]:
        """See `ParallelFolders.parts`."""
        return [
            Part(f"{split}/{name}", root / name / "blur", root / name / "sharp", split)
            for split in ("train", "test")
            if (root := self.folder / split).is_dir()
            for name in subfolders(root)
        ]

    def group(self, name: str) -> str:
        """The sequence."""
        return name.rpartition("/")[0]


class Rain13K(ParallelFolders):
    """train/Rain13K/input/1.jpg with train/Rain13K/target/1.jpg, and test/Rain100H, Rain100L,
    Test100, Test1200, Test2800 likewise.
    """

    name = "rain13k"
    task = "derain"
    sets: ClassVar = {
        "train": ["Rain13K"],
        "test": ["Rain100H", "Rain100L", "Test100", "Test1200", "Test2800"],
    }

    def fits(self, folder: Path) -> bool:
        """See `Source.fits`."""
        return any((folder / s / name).is_dir() for s, names in self.sets.items() for name in names)

    def parts(self) -> list[Part]:
        """See `ParallelFolders.parts`."""
        parts = []
        for split, known in self.sets.items():
            root = self.folder / split
            for name in subfolders(root) if root.is_dir() else []:
                if name not in known:
                    raise InputError(f"{root / name} is no part of it: {suggestion(name, known)}")
                folder = root / name
                parts.append(Part(f"{split}/{name}", folder / "input", folder / "target", split))
        return parts

    def read(self, chunk: Chunk) -> Iterator[Example]:
        """See `Source.read`. One clean picture is there with several rains: it is the group."""
        for example in chunk.items:
            try:
                content = example.target.read_bytes()
            except OSError as error:
                raise InputError(f"cannot read {example.target}: {error.strerror}") from error
            yield replace(example, group=digest_bytes(content, 8))


class Sidd(Source):
    """Data/0001_001_S6_00100_00060_3200_L/NOISY_SRGB_010.PNG with GT_SRGB_010.PNG beside it, one
    or more numbers in each folder, also as 0001_NOISY_SRGB_010.PNG (SIDD-Small, SIDD-Medium, sRGB).
    """

    name = "sidd"
    licence = "MIT to our knowledge; see the set's page"
    instance = re.compile(r"\d{4}_(\d{3})_\w+")  # instance, scene, camera, ISO, shutter, light
    picture = re.compile(r"(?:\d{4}_)?(GT|NOISY)_SRGB_(\d{3})", re.IGNORECASE)

    def fits(self, folder: Path) -> bool:
        """See `Source.fits`."""
        data = folder / "Data"
        return data.is_dir() and any(map(self.instance.fullmatch, subfolders(data)))

    def chunks(self) -> list[Chunk]:
        """See `Source.chunks`."""
        self.check_root()
        data = self.folder / "Data"
        return chunked([x for name in subfolders(data) for x in self._examples(data, name)])

    def read(self, chunk: Chunk) -> Iterator[Example]:
        """See `Source.read`."""
        yield from chunk.items

    def _examples(self, data: Path, instance: str) -> Iterator[Example]:
        """Pairs of one scene instance; their group is the scene, of which there are ten."""
        folder = data / instance
        scene, names = self.instance.fullmatch(instance), picture_names(folder)
        if not scene or not names:
            lacks = "holds no pictures" if scene else "is no scene instance"
            raise InputError(f"{folder} {lacks}, expected {self.layout}")
        sides: dict[str, list[tuple[str, Path]]] = {"NOISY": [], "GT": []}
        for name in names:
            match = self.picture.fullmatch(stem(name))
            if not match:
                raise InputError(f"{folder / name} is not of this set, expected {self.layout}")
            sides[match[1].upper()].append((match[2], folder / name))
        sources, targets = by_key(sides["NOISY"]), by_key(sides["GT"])
        check_matched(sources, targets, (folder, folder))
        for key in sources:
            name = f"{instance}/{key}"
            yield Example(name, sources[key], targets[key], (), "denoise", None, scene[1])


class Lol(ParallelFolders):
    """our485/low/2.png with our485/high/2.png for training, and eval15/low with eval15/high for
    testing.
    """

    name = "lol"
    task = "enhance"

    def fits(self, folder: Path) -> bool:
        """See `Source.fits`."""
        return any((folder / name).is_dir() for name in ("our485", "eval15"))

    def parts(self) -> list[Part]:
        """See `ParallelFolders.parts`."""
        return [
            Part(name, self.folder / name / "low", self.folder / name / "high", split)
            for name, split in (("our485", "train"), ("eval15", "test"))
            if (self.folder / name).is_dir()
        ]


class Folders(ParallelFolders):
    """--source NAME and --target NAME, two folders in the one given that hold the same names but
    for the suffixes, subfolders included, and --task NAME.
    """

    name = "folders"
    licence = "your own"
    options = ("source", "target", "task")
    depth = None

    def __init__(self, folder: Path, options: Options) -> None:
        super().__init__(folder, options)
        for option in self.options:
            if not getattr(options, option):
                raise InputError(f"{self.name} needs --{option} NAME: {self.layout}")

    def fits(self, folder: Path) -> bool:
        """See `Source.fits`."""
        return all((folder / name).is_dir() for name in (self.asked.source, self.asked.target))

    def parts(self) -> list[Part]:
        """See `ParallelFolders.parts`."""
        return [Part("", self.folder / self.asked.source, self.folder / self.asked.target, None)]
