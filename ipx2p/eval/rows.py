"""Rows of JSON by key, appended one by one, so that a killed run loses none of them (layer 4)."""

import json
import os
import re
from pathlib import Path
from typing import Any

from ipx2p.errors import InputError
from ipx2p.files import digest_bytes

MAX_SLUG = 60  # characters of each part of a file name


def key_of(content: Any) -> str:
    """A hash of anything that JSON can hold; equal contents have equal keys."""
    text = json.dumps(content, sort_keys=True)
    return digest_bytes(text.encode(), 12)


def file_stem(*parts: str) -> str:
    """A file name from texts, with a hash to tell apart those that are alike when cut."""
    slugs = (re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:MAX_SLUG] for text in parts)
    return "_".join([*slugs, key_of([*parts])[:6]])


class Rows:
    """The rows of all processes, FOLDER/STEM_RANK.jsonl; each appends to its own file.

    An incomplete last line is ignored.

    Raises: InputError for a file with damaged lines before the last.
    """

    def __init__(self, folder: Path, stem: str, rank: int = 0) -> None:
        self.folder = folder
        self.stem = stem
        self.path = folder / f"{stem}_{rank:03d}.jsonl"
        self.by_key: dict[str, dict[str, Any]] = {}
        if self.path.exists():  # drop a line that a killed run left half written
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self.read()

    def read(self) -> None:
        """Read the rows that any process has written."""
        for path in sorted(self.folder.glob(f"{self.stem}_*.jsonl")):
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            for number, line in enumerate(whole.split(b"\n"), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    self.by_key[row["key"]] = row
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{path} line {number} is damaged ({error}): remove the line, and its edit "
                        "is computed again"
                    ) from error

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, in one piece, and keep it."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")
        self.by_key[row["key"]] = row
