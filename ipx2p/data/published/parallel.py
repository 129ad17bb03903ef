"""Pairs in parallel folders: where a source and its target lie, and how their names correspond
(layer 2).
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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

_FIELD = re.compile(r"\{(\w*)\}")
_SUBFOLDERS = r"(?P<subfolders>(?:.*/)?)"
_FETCH = ": fetch what is missing, or correct the names"


class Naming:
    """How the names of a source and its target correspond: `rain-{}.png=norain-{}.png`.

    `{}` is any text without "/". Unnamed fields correspond by position, `{id}` by name; a field
    that the target lacks (`{id}_{}=id`) gives one target to several sources, and `{group}` is what
    must stay in one split. Without "=" both names are alike; without a suffix any suffix will do.

    Args:
        subfolders: names are compared in the same subfolder of both sides, unless they hold a "/".
    Raises: InputError for a text that pairs nothing.
    """

    def __init__(self, text: str, *, subfolders: bool = False) -> None:
        self.text = text
        source, sign, target = text.partition("=")
        prefix = _SUBFOLDERS if subfolders and "/" not in text else ""
        self.source, self.target = (
            _regex(side, prefix, text) for side in (source, target if sign else source)
        )
        if not set(self.target.groupindex) - {"subfolders"} <= set(self.source.groupindex):
            raise InputError(f"--pairs {text}: the target has a field that the source lacks")

    def key(self, match: re.Match) -> tuple[str, ...]:
        """What a source and its target have in common."""
        return tuple(match[field] for field in self.target.groupindex)


def _regex(side: str, prefix: str, text: str) -> re.Pattern:
    """A pattern of names; letter case counts in fields alone."""
    pieces = _FIELD.split(side)  # literal, field, literal, field, literal
    if len(pieces) == 1 or any(set("{}=") & set(literal) for literal in pieces[::2]):
        raise InputError(
            f"--pairs {text}: expected SOURCE=TARGET, two names with {{}} where they vary, such as "
            "'rain-{}.png=norain-{}.png'"
        )
    regex, known, number = prefix, set(), 0
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            regex += re.escape(piece)
        else:
            field = f"field_{piece or number}"
            regex += f"(?P={field})" if field in known else f"(?P<{field}>[^/]+)"
            known.add(field)
            number += not piece
    if stem(side) == side or f".{side.rpartition('.')[2].lower()}" not in PICTURES:
        regex += r"\.[^./]+"
    return re.compile(regex, re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Two parallel folders that belong to one split; `name` begins the names of their pairs.

    group: what they all must stay together with; "" leaves that to the naming, or to the target.
    """

    name: str
    source: Path
    target: Path
    split: str | None
    naming: Naming
    group: str = ""

    def fitness(self) -> tuple[bool, bool]:
        """Whether both folders are there and, if so, whether names in both fit."""
        sides = ((self.source, self.naming.source), (self.target, self.naming.target))
        there = all(folder.is_dir() for folder, _ in sides)
        return there, there and all(
            any(map(pattern.fullmatch, picture_names(folder))) for folder, pattern in sides
        )


@dataclass(frozen=True)
class Layout:
    """Where the two folders of a part lie below the root; `*` stands for any folder, a scene.

    Of several layouts with one name the one that fits is read.
    """

    name: str
    source: str
    target: str
    split: str | None
    pairs: str = "{}"

    def parts(self, root: Path) -> Iterator[Part]:
        """The parts of which a folder is there."""
        above, star, _ = self.source.partition("*")
        there = star and (root / above).is_dir()
        for scene in subfolders(root / above) if there else [""] * (not star):
            name, *sides = (x.replace("*", scene) for x in (self.name, self.source, self.target))
            source, target = (root / side.strip("/") for side in sides)  # "" is the root
            if source.is_dir() or (target.is_dir() and target not in source.parents):
                naming = Naming(self.pairs)
                yield Part(name, source, target, self.split, naming, name if star else "")


class ParallelFolders(Source):
    """Sources and targets in parallel folders. The folder given may be any folder of the set that
    holds whole parts, not just its root.
    """

    task: ClassVar[str | None] = None
    layouts: ClassVar[tuple[Layout, ...]] = ()

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
            for part in (part for layout in self.layouts for part in layout.parts(root)):
                if part.source.is_relative_to(inside) and part.target.is_relative_to(inside):
                    found[part.name].append(part)
            if found:
                break
        return found

    def _examples(self, part: Part) -> Iterator[Example | Fault]:
        naming, prefix = part.naming, f"{part.name}/" if part.name else ""
        left, strays = self._listed(part.source, part.target, naming.source, naming.target)
        right, others = self._listed(part.target, part.source, naming.target, naming.source)
        sources, targets = defaultdict(list), defaultdict(list)
        for path, match in left.items():
            sources[prefix + self.short(stem(match[0]))].append((path, match))
        for path, match in right.items():
            targets[naming.key(match)].append(path)
        lonely = dict(targets)
        for name, found in sources.items():
            match, paths = found[0][1], [path for path, _ in found]
            key, group = naming.key(match), match.groupdict().get("field_group")
            lonely.pop(key, None)
            group = prefix + group if group else part.group
            yield attempt(name, partial(self._pair, name, part, paths, targets.get(key, []), group))
        for path, *_ in lonely.values():
            yield Fault(prefix + stem(path.name), f"{path} has no source in {part.source}{_FETCH}")
        for path in dict.fromkeys([*strays, *others]):
            reason = f"{path} does not fit {naming.text}, expected {self.layout}"
            yield Fault(prefix + path.name, reason)

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

    def _pair(
        self, name: str, part: Part, sources: list[Path], targets: list[Path], group: str
    ) -> Example:
        for twice in (paths for paths in (sources, targets) if len(paths) > 1):
            raise InputError(f"{twice[0]} and {twice[1]} would be one picture: remove one of them")
        if not is_unicode(name):
            path = str(sources[0])
            raise InputError(f"the name of {path!a} is not valid Unicode text: rename the file")
        if not targets:
            raise InputError(f"{sources[0]} has no target in {part.target}{_FETCH}")
        if targets == sources:
            raise InputError(f"{sources[0]} would be its own target: see --pairs")
        task = self.asked.task or self.task
        return Example(name, sources[0], targets[0], (), task, part.split, group)
