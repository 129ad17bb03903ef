"""The cases of a comparison: pictures with their instructions and targets (layer 4)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ipx2p.data.listing import find_photos
from ipx2p.data.manifest import read_lines
from ipx2p.editing.settings import check_instructions
from ipx2p.errors import InputError
from ipx2p.files import digest_file
from ipx2p.images import fit_size, image_size
from ipx2p.seeds import generator

MAX_NAME = 60  # characters of a picture's name in file names and on sheets


@dataclass(frozen=True)
class Case:
    """One picture and its instruction.

    name: unique among the cases. captions: of the source and of the target. group: equal for cases
    of one photograph, which are one sample of the statistics; "" is the content of the source.
    after: name of the case whose result is edited instead of the source, each model its own.
    is_step: it is only made for the case after it, and not reported.
    benchmark: the published protocol that it is measured by; "" for own pairs.
    results: names that its result may have in a folder of pictures made elsewhere.
    mask: of what may change: a picture, light there; or (start, length, start, ...) over a flat
    square of 512 x 512.
    """

    name: str
    source: Path
    instruction: str
    task: str = ""
    target: Path | None = None
    captions: tuple[str, str] | None = None
    group: str = ""
    after: str | None = None
    is_step: bool = False
    benchmark: str = ""
    results: tuple[str, ...] = ()
    mask: tuple[int, ...] | Path | None = None

    @cached_property
    def digest(self) -> str:
        """A hash of the source file."""
        return digest_file(self.source)

    @cached_property
    def target_digest(self) -> str | None:
        """A hash of the target file."""
        return self.target and digest_file(self.target)

    @cached_property
    def mask_digest(self) -> str | tuple[int, ...] | None:
        """A hash of the mask's file, or the mask itself."""
        return digest_file(self.mask) if isinstance(self.mask, Path) else self.mask

    def check(self, *, of_one_size: bool = True) -> None:
        """Raise InputError for a file that is not a picture, or a target of another size."""
        size = image_size(self.source)
        if isinstance(self.mask, Path) and image_size(self.mask) != size:
            width, height = image_size(self.mask)
            raise InputError(
                f"{self.source} is {size[0]} x {size[1]}, its mask {self.mask} is {width} x "
                f"{height}: a mask must have the size of its source"
            )
        if self.target is not None and image_size(self.target) != size and of_one_size:
            width, height = image_size(self.target)
            raise InputError(
                f"{self.source} is {size[0]} x {size[1]}, its target {self.target} is "
                f"{width} x {height}: a pair must have one size"
            )


@dataclass(frozen=True)
class Sizes:
    """Sizes of pictures, in pixels.

    resolution: the long side of edits; None is that of the picture. multiple: of their sides.
    at_target: pictures are compared at the size of the target (the source, if there is none);
    otherwise at that of the edit.
    """

    resolution: int | None
    multiple: int
    at_target: bool = False

    def of_edit(self, case: Case) -> tuple[int, int]:
        """(width, height) of its edits."""
        return fit_size(*image_size(case.source), self.resolution, self.multiple)

    def of_scores(self, case: Case) -> tuple[int, int]:
        """(width, height) at which its edits are compared with source and target."""
        return image_size(case.target or case.source) if self.at_target else self.of_edit(case)


def cases_of_images(
    paths: Sequence[Path],
    instructions: Sequence[str],
    targets: Sequence[Path] = (),
    captions: tuple[str, str] | None = None,
    masks: Sequence[Path] = (),
) -> list[Case]:
    """Pictures with one instruction each, or one for all; one target and mask each, or none."""
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
    for what, given in (("targets", targets), ("masks", masks)):
        if given and len(given) != len(paths):
            raise InputError(f"{len(paths)} pictures but {len(given)} {what}: give one each")
    instructions = [*instructions] * (len(paths) if len(instructions) == 1 else 1)
    none = [None] * len(paths)
    return _named(
        Case(path.stem, path, instruction, target=target, captions=captions, mask=mask)
        for path, instruction, target, mask in zip(
            paths, instructions, targets or none, masks or none, strict=True
        )
    )


def cases_of_folder(
    folder: Path, instructions: Sequence[str], output: Path | None = None
) -> list[Case]:
    """The photographs of a folder, by name, but those of `output`; all with one instruction."""
    if len(instructions) != 1:
        raise InputError(f"{len(instructions)} instructions: a --folder takes one for all of it")
    photos = find_photos(folder)
    if output is not None and folder.resolve() in output.resolve().parents:
        photos = [path for path in photos if output.resolve() not in path.resolve().parents]
    return cases_of_images(photos, instructions)


def cases_of_manifest(path: Path) -> list[Case]:
    """The pairs of a manifest, each with its first instruction, and its captions if any."""
    cases = []
    for line in read_lines(path):
        (source, target), record = line.pictures, line.record
        captions = (record.source_caption, record.target_caption)
        if captions != (None, None) and not all(isinstance(c, str) and c.strip() for c in captions):
            raise InputError(
                f"{line.where}: source_caption is {captions[0]!r}, target_caption "
                f"{captions[1]!r}: expected two texts, or null for both"
            )
        name, captions = f"{source.stem}-{record.task}", None if None in captions else captions
        about = (name, source, record.instructions[0], record.task, target, captions)
        cases.append(Case(*about, group=record.group or ""))
    if not cases:
        raise InputError(f"manifest {path} lists no pairs")
    return _named(cases)


def draw(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """At most `limit` of the cases, always the same ones, in order, and those that they follow."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected 1 or more pictures")
    reported = [case for case in cases if not case.is_step]
    if limit is None or limit >= len(reported):
        return [*cases]
    drawn = torch.randperm(len(reported), generator=generator(0, "compare limit"))[:limit]
    named = {case.name: case for case in cases}
    taken: set[str] = set()
    for case in (reported[item] for item in drawn.tolist()):
        while case is not None and case.name not in taken:
            taken.add(case.name)
            case = named.get(case.after)
    return [case for case in cases if case.name in taken]


def _named(cases: Sequence[Case]) -> list[Case]:
    """The same cases with unique names."""
    named: dict[str, Case] = {}
    for case in cases:
        name = case.name[:MAX_NAME]
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        free = next(n for n in itertools.chain([name], numbered) if n not in named)
        named[free] = replace(case, name=free)
    return [*named.values()]
