"""Pairs in parallel folders: where source and target are, how their names correspond (layer 2)."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count, zip_longest
from pathlib import Path
from typing import ClassVar

from ipx2p.data.listing import PICTURES, picture_names
from ipx2p.data.published.source import (
    Chunk,
    Example,
    Fault,
    Source,
    attempt,
    chunked,
    is_unicode,
    stem,
    subfolders,
)
from ipx2p.errors import InputError

_FETCH = "fetch what is missing, or correct the names"


@cache
def patterns(pairs: str, inside: bool = False) -> tuple[re.Pattern, re.Pattern]:
    """How the names of a source and its target correspond: `rain-{}.png=norain-{}.png`.

    `{}` is any text without "/". Unnamed fields correspond by position, `{id}` by name; a field
    that the target lacks (`{id}_{}={id}`) gives one target to several sources, and `{group}` is
    what must stay in one split. Without "=" both names are alike, but for suffixes that it lacks.

    Args:
        inside: names are compared in the same subfolder of both sides, unless they hold a "/".
    Raises: InputError for a text that pairs nothing.
    """
    source, sign, target = pairs.partition("=")
    folders = r"(?P<folders>(?:.*/)?)" if inside and "/" not in pairs else ""
    source, target = (_pattern(side, folders) for side in (source, target if sign else source))
    if not (source and target and {*target.groupindex} <= {*source.groupindex}):
        raise InputError(
            f"--pairs {pairs}: expected SOURCE=TARGET, two names with {{}} or {{id}} where they "
            "vary, all fields of the target in the source too, such as 'rain-{}.png=norain-{}.png'"
        )
    return source, target


def _pattern(side: str, regex: str) -> re.Pattern | None:
    """A pattern of names, None if there is nothing in it that varies."""
    pieces = re.split(r"\{(\w*)\}", side)  # literal, field, literal, field, literal
    if len(pieces) == 1 or re.search("[{}=]", "".join(pieces[::2])):
        return None
    unnamed = count()
    for literal, field in zip_longest(pieces[::2], pieces[1::2]):
        regex += re.escape(literal)
        if field is not None:
            name = f"field_{field or next(unnamed)}"
            regex += f"(?P={name})" if f"<{name}>" in regex else f"(?P<{name}>[^/]+)"
    if os.path.splitext(side)[1].lower() not in PICTURES:
        regex += r"\.[^./]+"  # any suffix
    return re.compile(regex, re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Two parallel folders of one split; declared relative to the root, with `*` for any scene.

    name: begins the names of the pairs; of several parts with one name the one that fits is read.
    pairs: see `patterns`. group: of the whole part; "" leaves it to the names of the pictures.
    """

    name: str
    source: Path | str
    target: Path | str
    split: str | None
    pairs: str = "{}"
    group: str = ""

    def below(self, root: Path) -> Iterator["Part"]:
        """The parts of this declaration that exist, or half of them."""
        above, star, _ = self.source.partition("*")
        there = star and (root / above).is_dir()
        for scene in subfolders(root / above) if there else [""] * (not star):
            name, *sides = (x.replace("*", scene) for x in (self.name, self.source, self.target))
            source, target = (root / side for side in sides)
            if source.is_dir() or (target.is_dir() and target not in source.parents):
                group = name if star else ""
                yield replace(self, name=name, source=source, target=target, group=group)

    def fitness(self) -> int:
        """How many of both sides hold pictures with names that fit; 0 unless both are there."""
        if not (self.source.is_dir() and self.target.is_dir()):
            return 0
        sides = zip((self.source, self.target), patterns(self.pairs), strict=True)
        return sum(any(map(x.fullmatch, picture_names(folder))) for folder, x in sides)


class ParallelFolders(Source):
    """Sources and targets in parallel folders. The folder given may be any folder of the set that
    holds whole parts, not just its root.
    """

    task: ClassVar[str | None] = None
    layouts: ClassVar[tuple[Part, ...]] = ()
    inside: ClassVar[bool] = False  # see `patterns`

    def fits(self, folder: Path) -> bool:
        return bool(self._found(folder))

    def parts(self) -> list[Part]:
        """The parallel folders of the set."""
        found = self._found(self.folder).values()
        return [max(some, key=Part.fitness) if some[1:] else some[0] for some in found]

    def short(self, name: str) -> str:
        """What a pair is called, from the name of its source without the suffix."""
        return name

    def chunks(self) -> list[Chunk]:
        self.check_root()
        return chunked([x for part in self.parts() for x in self._examples(part)])

    def _found(self, folder: Path) -> dict[str, list[Part]]:
        """The parts that are there, by name."""
        whole = Path(os.path.abspath(folder))
        found = defaultdict(list)
        for root in (*whole.parents[1::-1], folder):
            inside = folder if root is folder else whole
            for part in (part for layout in self.layouts for part in layout.below(root)):
                if part.source.is_relative_to(inside) and part.target.is_relative_to(inside):
                    found[part.name].append(part)
            if found:
                break
        return found

    def _examples(self, part: Part) -> Iterator[Example | Fault]:
        prefix = f"{part.name}/" if part.name else ""
        ours, theirs = patterns(part.pairs, self.inside)
        left, strays = self._listed(part.source, part.target, ours, theirs)
        right, others = self._listed(part.target, part.source, theirs, ours)
        sources, targets = defaultdict(list), defaultdict(list)
        for path, match in left.items():
            sources[prefix + self.short(stem(match[0]))].append(path)
        for path, match in right.items():
            targets[match.groups()].append(path)
        alone = dict(targets)
        for name, paths in sources.items():
            fields = left[paths[0]].groupdict()
            key, group = tuple(map(fields.get, theirs.groupindex)), fields.get("field_group")
            alone.pop(key, None)
            whole = replace(part, group=prefix + group) if group else part
            yield attempt(name, partial(self._pair, name, whole, paths, targets.get(key, [])))
        for path, *_ in alone.values():
            reason = f"{path} has no source in {part.source}: {_FETCH}"
            yield Fault(prefix + path.relative_to(part.target).as_posix(), reason)
        for path in dict.fromkeys([*strays, *others]):
            reason = f"{path} does not fit {part.pairs}, expected {self.layout}"
            below = part.source if path.is_relative_to(part.source) else part.target
            yield Fault(prefix + path.relative_to(below).as_posix(), reason)

    def _listed(
        self, folder: Path, other: Path, ours: re.Pattern, theirs: re.Pattern
    ) -> tuple[dict[Path, re.Match], list[Path]]:
        """The pictures in a folder whose names fit, and those that fit neither side."""
        if not folder.is_dir():
            raise InputError(f"folder {folder} is missing, expected {self.layout}")
        names = picture_names(folder)
        if other != folder and other.is_relative_to(folder):
            inner = f"{other.relative_to(folder).as_posix()}/"
            names = [name for name in names if not name.startswith(inner)]
        if not names:
            raise InputError(f"{folder} holds no pictures, expected {self.layout}")
        found, strays = {}, []
        for name in names:
            match = ours.fullmatch(name)
            is_theirs = folder == other and theirs.fullmatch(name)
            # A name that fits both patterns belongs to the one that says more.
            if match and not (is_theirs and len(theirs.pattern) > len(ours.pattern)):
                found[folder / name] = match
            elif not is_theirs:
                strays.append(folder / name)
        return found, strays

    def _pair(self, name: str, part: Part, sources: list[Path], targets: list[Path]) -> Example:
        for twice in (paths for paths in (sources, targets) if len(paths) > 1):
            raise InputError(f"{twice[0]} and {twice[1]} would be one picture: remove one of them")
        if not is_unicode(name):
            path = str(sources[0])
            raise InputError(f"the name of {path!a} is not valid Unicode text: rename the file")
        if not targets:
            raise InputError(f"{sources[0]} has no target in {part.target}: {_FETCH}")
        if targets == sources:
            raise InputError(f"{sources[0]} would be its own target: see --pairs")
        task = self.asked.get("task") or self.task
        return Example(name, sources[0], targets[0], (), task, part.split, part.group)
