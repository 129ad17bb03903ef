"""What a comparison edits: pictures, each with what is asked and known of it (layer 4)."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from ipx2p.data.listing import find_photos
from ipx2p.data.pairs import ManifestPairs
from ipx2p.editing.settings import check_instructions
from ipx2p.errors import InputError
from ipx2p.files import digest_file
from ipx2p.images import fit, image_size, load_image, resize
from ipx2p.seeds import generator

MAX_NAME = 60  # characters of a picture's name in file names and on sheets


@dataclass(frozen=True)
class Case:
    """One picture and what is asked of it.

    name: unlike those of the other cases. captions: what the source and the target show.
    """

    name: str
    source: Path
    instruction: str
    task: str = ""
    target: Path | None = None
    captions: tuple[str, str] | None = None

    @cached_property
    def digest(self) -> str:
        """Of the source's file."""
        return digest_file(self.source)

    @cached_property
    def target_digest(self) -> str | None:
        """Of the target's file."""
        return self.target and digest_file(self.target)

    def check(self) -> None:
        """Raise InputError for a picture that is none, or a target of another size."""
        size = image_size(self.source)
        if self.target is not None and image_size(self.target) != size:
            width, height = image_size(self.target)
            raise InputError(
                f"{self.source} is {size[0]} x {size[1]}, its target {self.target} is "
                f"{width} x {height}: a pair must have one size"
            )

    def load(self, resolution: int | None, multiple: int) -> Image.Image:
        """The source at the size of its edits."""
        return fit(load_image(self.source), resolution, multiple)

    def load_target(self, size: tuple[int, int]) -> Image.Image:
        """The target at (width, height) of the edits."""
        return resize(load_image(self.target), size)


def cases_of_images(
    paths: Sequence[Path],
    instructions: Sequence[str],
    *,
    targets: Sequence[Path] = (),
    captions: tuple[str, str] | None = None,
) -> list[Case]:
    """Pictures with one instruction for all of them, or one each; targets one each or none."""
    if not paths:
        raise InputError("no pictures: give --image, --folder or --manifest")
    if len(instructions) not in (1, len(paths)):
        raise InputError(
            f"{len(paths)} pictures but {len(instructions)} instructions: give one for all of "
            "them, or one each"
        )
    check_instructions(instructions)
    if captions is not None and not all(caption.strip() for caption in captions):
        raise InputError("a caption is empty: say what the pictures show, or leave both out")
    if targets and len(targets) != len(paths):
        raise InputError(f"{len(paths)} pictures but {len(targets)} targets: give one each")
    instructions = [*instructions] * (len(paths) if len(instructions) == 1 else 1)
    return _named(
        Case(path.stem, path, instruction, target=target, captions=captions)
        for path, instruction, target in zip(
            paths, instructions, targets or [None] * len(paths), strict=True
        )
    )


def cases_of_folder(
    folder: Path, instructions: Sequence[str], output: Path | None = None
) -> list[Case]:
    """The photographs of a folder, in order of their names, with one instruction.

    Args:
        output: a folder in it that holds results, not photographs.
    """
    if len(instructions) != 1:
        raise InputError(f"{len(instructions)} instructions: a --folder takes one for all of it")
    photos = find_photos(folder)
    if output is not None and folder.resolve() in output.resolve().parents:
        photos = [path for path in photos if output.resolve() not in path.resolve().parents]
    return cases_of_images(photos, instructions)


def cases_of_manifest(path: Path) -> list[Case]:
    """The pairs of a manifest, each with the first of its instructions, and its captions if any."""
    pairs = ManifestPairs(path)
    captions = _captions(path)
    cases = []
    for item in range(len(pairs)):
        source, target = pairs.files(item)
        task = pairs.task(item)
        cases.append(
            Case(
                name=f"{source.stem}-{task}",
                source=source,
                instruction=pairs.instructions(item)[0],
                task=task,
                target=target,
                captions=captions[item],
            )
        )
    return _named(cases)


def draw(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """At most `limit` of them, drawn once and for all, in their order."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected 1 or more pictures")
    if limit is None or limit >= len(cases):
        return [*cases]
    drawn = torch.randperm(len(cases), generator=generator(0, "compare limit"))
    return [cases[item] for item in sorted(drawn[:limit].tolist())]


def _captions(path: Path) -> list[tuple[str, str] | None]:
    """source_caption and target_caption of each pair, in the order of the lines."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = json.loads(line)
            both = (record.get("source_caption"), record.get("target_caption"))
            if both != (None, None) and not all(isinstance(c, str) and c.strip() for c in both):
                raise InputError(
                    f"{path} line {number}: source_caption is {both[0]!r}, target_caption "
                    f"{both[1]!r}: expected two texts, or null for both"
                )
            found.append(None if None in both else both)
    return found


def _named(cases: Sequence[Case]) -> list[Case]:
    """The same cases under names that differ."""
    named: dict[str, Case] = {}
    for case in cases:
        name = case.name[:MAX_NAME]
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        free = next(n for n in itertools.chain([name], numbered) if n not in named)
        named[free] = replace(case, name=free)
    return [*named.values()]
