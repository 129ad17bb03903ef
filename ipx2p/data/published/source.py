"""Published pairs as they are found: examples, and what all readers of data sets share (layer 2).

A source lists a published set in chunks, small units of work that can be sent to other processes,
and reads each chunk into examples and faults. A fault is an example that cannot be used; the caller
decides whether to stop or to leave it out. Pictures are still files, or encoded bytes.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ipx2p.data.listing import scan
from ipx2p.errors import InputError
from ipx2p.files import digest_bytes
from ipx2p.images import load_image, load_image_bytes

# How published sets call their splits, in names of folders and files.
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "val"
)
PAIRS = 64  # in a chunk, about
_TASK = re.compile(r"\w[\w .+-]{,99}")
_FEW = 20  # names that an error looks at in a large folder


@dataclass(frozen=True)
class Example:
    """One published pair.

    Args:
        name: unique in the set and stable, usable as a relative file name without a suffix.
        source, target: the picture's file, or the encoded picture.
        instructions: all that fit; empty if the set has no sentences.
        task: what the edit is.
        split: "train", "val" or "test" as published, None if the set is not split.
        group: equal for the pairs of the set that must stay in one split, such as those of a scene;
            "" if only pairs with the same target must.
        source_caption, target_caption: what the pictures show.
        origin: the file, and the row in it, for errors.
    """

    name: str
    source: Path | bytes
    target: Path | bytes
    instructions: tuple[str, ...]
    task: str
    split: str | None
    group: str
    source_caption: str | None = None
    target_caption: str | None = None
    origin: str = ""


@dataclass(frozen=True)
class Fault:
    """An example that cannot be used. reason: what is wrong, one line that names the file."""

    name: str
    reason: str


def attempt(name: str, read: Callable[[], Example]) -> Example | Fault:
    """What `read` returns, or its InputError as a fault."""
    try:
        return read()
    except InputError as error:
        return Fault(name, str(error))


@dataclass(frozen=True)
class Chunk:
    """Pairs that are read together: faults, and items that only the source that listed them knows.

    key: distinguishes them from any other pairs of the set, wherever it lies.
    """

    items: tuple[Any, ...]
    key: str


class Source(ABC):
    """A reader of one kind of published set. Its docstring is the layout that errors print.

    Args:
        folder: the root of the set.
        options: what is asked of the set, by name; only those in the class's `options` may be
            given, the others are None. `task`: what the edit is, where the set does not say.
            `source`, `target`: two folders, relative to `folder`. `pairs`: how names correspond.
            `columns`: of source, instruction and target.
    """

    name: ClassVar[str]
    layout: ClassVar[str]
    licence: ClassVar[str] = "see the set's page"
    options: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.layout = " ".join((cls.__doc__ or cls.__name__).split()).rstrip(".")

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.asked = {name: value for name, value in options.items() if value is not None}
        for option, value in self.asked.items():
            if option not in self.options:
                takes = ", ".join(f"--{name}" for name in self.options) or "no options"
                raise InputError(f"{self.name} does not take --{option} {value}: it takes {takes}")
        task = self.asked.get("task", "none")
        if not _TASK.fullmatch(task):  # it becomes the name of a folder
            raise InputError(
                f"--task is {task!a:.80}, expected a name such as derain: letters, digits, spaces "
                "and . + _ -, the first a letter or a digit"
            )
        self.folder = folder

    @abstractmethod
    def fits(self, folder: Path) -> bool:
        """Whether a folder looks like the root of such a set."""

    @abstractmethod
    def chunks(self) -> list[Chunk]:
        """List the set, in a stable order. A source without a target is a fault, and so is a file
        that the set lists and the disk lacks.

        Raises: InputError that says what was found instead of the set.
        """

    def read(self, chunk: Chunk) -> Iterator[Example | Fault]:
        """The pairs of a chunk, by default as they were listed."""
        yield from chunk.items

    def check_root(self) -> None:
        """Raise InputError unless the folder looks right: what it holds, and where to look."""
        if not self.folder.is_dir():
            found = "a file" if self.folder.exists() else "nothing"
            raise InputError(f"{self.folder} is {found}, expected a folder: {self.layout}")
        if self.fits(self.folder):
            return
        folders = subfolders(self.folder)[:_FEW]
        near = [self.folder.absolute().parent, *(self.folder / name for name in folders)]
        hint = next((f"; did you mean {path}?" for path in near if self.fits(path)), "")
        raise InputError(
            f"{self.folder} is not the root of {self.name}, expected {self.layout}; "
            f"found {few(sorted(scan(self.folder)))}{hint}"
        )

    def check_any(self, path: Path, listed: Sized) -> None:
        """Raise InputError if a list of the set is empty."""
        if not listed:
            raise InputError(f"{path} lists nothing, expected {self.layout}")


def load_example(example: Example) -> tuple[Image.Image, Image.Image]:
    """Decode both pictures, by the rules of `load_image`.

    Raises: InputError that names the file or row of a damaged picture, or two that differ in size.
    """
    images, found = [], []
    for side, picture in (("source", example.source), ("target", example.target)):
        is_file = isinstance(picture, Path)
        where = str(picture) if is_file else f"{example.origin} {side}"
        image = load_image(picture) if is_file else load_image_bytes(picture, where)
        images.append(image)
        found.append(f"{where} is {image.width} x {image.height}")
    source, target = images
    if source.size != target.size:
        raise InputError(f"{', '.join(found)}: a pair must have one size")
    return source, target


def sentence(value: object, where: str) -> str:
    """A sentence from a file. InputError if it is not text, blank or not Unicode."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} is {value!a:.80}, expected a sentence")
    if not is_unicode(value) or "\0" in value:
        raise InputError(f"{where} is not valid Unicode text: {value!a:.80}")
    return value


def caption(value: object, where: str) -> str | None:
    """What a picture shows; None where the file leaves it out."""
    return None if value is None or value == "" else sentence(value, where)


def is_unicode(text: str) -> bool:
    """Whether the text can be written down: JSON and file systems can name halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def few(names: list[str]) -> str:
    """Some of many names in a line."""
    shown = ", ".join(names[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(name for name, is_folder in scan(folder).items() if is_folder)


def chunked(examples: list[Example | Fault]) -> list[Chunk]:
    """Chunks of examples that are complete as they were listed."""
    parts = [tuple(examples[i : i + PAIRS]) for i in range(0, len(examples), PAIRS)]
    return [Chunk(part, chunk_key([e.name for e in part])) for part in parts]


def chunk_key(names: Sequence[str]) -> str:
    """The key of a chunk with these names in it: the first, and a hash of all."""
    return f"{names[0]} {digest_bytes(json.dumps(names).encode(), 8)}"


def stem(name: str) -> str:
    """A file's name without its suffix, folders kept."""
    return os.path.splitext(name)[0]
