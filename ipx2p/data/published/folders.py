"""Published pairs in parallel folders, as their sets are unpacked (layer 2).

One class for each set; its docstring is the layout, which errors print, and its `layouts` declare
the folders. The sets have no sentences, and their splits are those of the publication.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ipx2p.data.published.parallel import ParallelFolders, Part, patterns
from ipx2p.data.published.source import Chunk, Example, Fault, attempt, subfolders
from ipx2p.errors import InputError, suggestion
from ipx2p.files import digest_bytes

_CC_BY = "CC BY 4.0 to our knowledge; see the set's page"


class Reds(ParallelFolders):
    """[train/]train_blur/000/00000000.png (or train_blur_jpeg, train_blur_comp) with
    [train/]train_sharp/000/00000000.png, and [val/]val_blur with [val/]val_sharp likewise.
    """

    name = "reds"
    licence = _CC_BY
    task = "deblur"
    layouts = tuple(
        Part(split, f"{root}{split}_{blur}", f"{root}{split}_sharp", split, "{group}/{}")
        for split in ("train", "val")
        for blur in ("blur", "blur_jpeg", "blur_comp")
        for root in ("", f"{split}/")
    )


class GoPro(ParallelFolders):
    """train/GOPR0372_07_00/blur/000047.png with train/GOPR0372_07_00/sharp/000047.png, and test
    likewise (blur_gamma is not read); or train/input/GOPR0372_07_00-000047.png with
    train/target/GOPR0372_07_00-000047.png, and test likewise.
    """

    name = "gopro"
    licence = _CC_BY
    task = "deblur"
    layouts = tuple(
        layout
        for split in ("train", "test")
        for layout in (
            Part(f"{split}/*", f"{split}/*/blur", f"{split}/*/sharp", split),
            Part(split, f"{split}/input", f"{split}/target", split, "{group}-{}"),
            Part(split, f"{split}/input", f"{split}/target", split),
        )
    )


class Rain13K(ParallelFolders):
    """train/Rain13K/input/1.jpg with train/Rain13K/target/1.jpg (or train/input with train/target),
    and test/Rain100H, Rain100L, Test100, Test1200, Test2800 likewise.
    """

    name = "rain13k"
    task = "derain"
    sets: ClassVar = {
        "train": ["Rain13K"],
        "test": ["Rain100H", "Rain100L", "Test100", "Test1200", "Test2800"],
    }
    layouts = tuple(
        Part(f"{split}/{name}", f"{folder}/input", f"{folder}/target", split)
        for split, names in sets.items()
        for name in names
        for folder in (f"{split}/{name}", name, *(["train"] if split == "train" else []))
    )

    def parts(self) -> list[Part]:
        for split, known in self.sets.items():
            root = self.folder / split
            for name in subfolders(root) if root.is_dir() else []:
                if name not in (*known, "input", "target"):
                    raise InputError(f"{root / name} is no part of it: {suggestion(name, known)}")
        return super().parts()

    def read(self, chunk: Chunk) -> Iterator[Example | Fault]:
        """A clean picture may have several rainy ones: it is their group."""
        for item in chunk.items:
            yield item if isinstance(item, Fault) else attempt(item.name, partial(_grouped, item))


def _grouped(example: Example) -> Example:
    try:
        content = example.target.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {example.target}: {error.strerror}") from error
    return replace(example, group=digest_bytes(content, 8))


class Rain100(ParallelFolders):
    """Rain100H/rainy/rain-001.png (or in rain/, or beside it) with Rain100H/norain-001.png (or in
    norain/ or rainy/), Rain100L for testing, and RainTrainH, RainTrainL for training likewise.
    """

    name = "rain100"
    task = "derain"
    layouts = tuple(
        Part(name, f"./{name}/{rainy}", f"./{name}/{clean}", split, "rain-{}=norain-{}")
        for name, split in (
            *(("Rain100H", "test"), ("Rain100L", "test")),
            *(("RainTrainH", "train"), ("RainTrainL", "train"), ("", None)),
        )
        for rainy in ("rainy", "rain", "")
        for clean in dict.fromkeys(("", "norain", rainy))
        if name or rainy
    )


class Rain1400(ParallelFolders):
    """training/rainy_image/1_1.jpg with training/ground_truth/1.jpg, several rainy pictures for
    each clean one, and testing likewise (or Rain12600 and Rain1400 in place of them).
    """

    name = "rain1400"
    task = "derain"
    layouts = tuple(
        Part(name, f"./{name}/rainy_image", f"./{name}/ground_truth", split, "{id}_{}={id}")
        for name, split in (
            *(("training", "train"), ("Rain12600", "train")),
            *(("testing", "test"), ("Rain1400", "test"), ("", None)),
        )
    )


class Sidd(ParallelFolders):
    """Data/0001_001_S6_00100_00060_3200_L/NOISY_SRGB_010.PNG with GT_SRGB_010.PNG beside it, one
    or more numbers in each folder, also as 0001_NOISY_SRGB_010.PNG (SIDD-Small, SIDD-Medium, sRGB).
    """

    name = "sidd"
    licence = "MIT to our knowledge; see the set's page"
    task = "denoise"
    instance = re.compile(r"\d{4}_(\d{3})_\w+")  # instance, scene, camera, ISO, shutter, light
    layouts = tuple(
        Part("*", "Data/*", "Data/*", None, f"{prefix}NOISY_SRGB_{{}}={prefix}GT_SRGB_{{}}")
        for prefix in ("", "{instance}_")
    )

    def parts(self) -> list[Part]:
        """The scene instances; their group is the scene, of which there are ten."""
        parts = super().parts()
        for place, part in enumerate(parts):
            scene = self.instance.fullmatch(part.name)
            if not scene:
                raise InputError(f"{part.source} is no scene instance, expected {self.layout}")
            parts[place] = replace(part, group=scene[1])
        return parts

    def short(self, name: str) -> str:
        return name.rpartition("_")[2]


class Lol(ParallelFolders):
    """our485/low/2.png with our485/high/2.png for training, and eval15/low with eval15/high for
    testing; or, of LOL-v2, Real_captured/Train/Low/low00001.png with
    Real_captured/Train/Normal/normal00001.png, Test and Synthetic likewise.
    """

    name = "lol"
    task = "enhance"
    layouts = (
        Part("our485", "our485/low", "our485/high", "train"),
        Part("eval15", "eval15/low", "eval15/high", "test"),
        *(
            Part(f"{kind}{name}", f"{kind}{name}/Low", f"{kind}{name}/Normal", split, pairs)
            for kind in ("Real_captured/", "Synthetic/", "")
            for name, split in (("Train", "train"), ("Test", "test"))
            for pairs in ("low{}=normal{}", "{}")
        ),
    )


class Folders(ParallelFolders):
    """--source NAME and --target NAME, two folders in the one given that hold the same names but
    for the suffixes, subfolders included, or names that --pairs SOURCE=TARGET relates, and --task
    NAME.
    """

    name = "folders"
    licence = "your own"
    options = ("source", "target", "task", "pairs")
    inside = True

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        super().__init__(folder, options)
        for option in self.options[:3]:
            if not self.asked.get(option):
                raise InputError(f"{self.name} needs --{option} NAME: {self.layout}")
        patterns(self.asked.get("pairs", "{}"))

    def fits(self, folder: Path) -> bool:
        return all((folder / self.asked[side]).is_dir() for side in ("source", "target"))

    def parts(self) -> list[Part]:
        source, target = (self.folder / self.asked[side] for side in ("source", "target"))
        return [Part("", source, target, None, self.asked.get("pairs", "{}"))]


SETS = (Reds, GoPro, Rain13K, Rain100, Rain1400, Sidd, Lol, Folders)
