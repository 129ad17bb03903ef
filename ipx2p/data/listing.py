"""The files of a folder, in an order that depends on their names alone (layer 2)."""

import os
from collections.abc import Container
from pathlib import Path

from ipx2p.errors import InputError

PICTURES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_photos(folder: Path) -> list[Path]:
    """The picture files in a folder and its subfolders, in order of their names.

    Raises: InputError if there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of photographs")
    photos = [folder / name for name in picture_names(folder)]
    if not photos:
        raise InputError(f"{folder} holds no pictures, expected {', '.join(sorted(PICTURES))}")
    return photos


def picture_names(folder: Path) -> list[str]:
    """The picture files below a folder, as `file_names` lists them."""
    return file_names(folder, PICTURES)


def file_names(folder: Path, suffixes: Container[str]) -> list[str]:
    """The files with some suffixes below a folder: relative paths with "/", sorted by their parts.

    Raises: InputError for a folder that cannot be read.
    """
    names: list[str] = []
    prefixes = [""]
    visited = set()  # links may lead back to a folder that contains them
    while prefixes:
        prefix = prefixes.pop()
        where = os.path.realpath(folder / prefix)
        if where in visited:
            continue
        visited.add(where)
        for name, is_folder in scan(folder / prefix).items():
            if is_folder:
                prefixes.append(f"{prefix}{name}/")
            elif os.path.splitext(name)[1].lower() in suffixes:
                names.append(prefix + name)
    return sorted(names, key=lambda name: name.split("/"))


def scan(folder: Path) -> dict[str, bool]:
    """The names in a folder, unsorted, and which of them are folders; hidden ones are left out.

    Raises: InputError if it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from error
    return {name: found[name] for name in found if name[0] != "." and name != "__MACOSX"}
