"""Rows of JSON by key, appended as they come, so that a killed run loses none of them (layer 4)."""

import json
import os
from pathlib import Path
from typing import Any

from ipx2p.errors import InputError
from ipx2p.files import digest_bytes


def key_of(content: Any) -> str:
    """A hash of whatever JSON can write; equal contents have equal keys."""
    text = json.dumps(content, sort_keys=True)
    return digest_bytes(text.encode(), 12)


class Rows:
    """The rows of all processes, FOLDER/STEM_RANK.jsonl; each appends to its own file.

    A last line that was cut off in the middle does not count.

    Raises: InputError for a file with damaged lines before the last.
    """

    def __init__(self, folder: Path, stem: str, rank: int = 0) -> None:
        self.folder = folder
        self.stem = stem
        self.path = folder / f"{stem}_{rank:03d}.jsonl"
        self.by_key: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Take in what is on the disk, by whichever process."""
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
                        f"{path} line {number} is damaged ({error}): remove the line, and what it "
                        "held is computed again"
                    ) from error

    def cut_torn_line(self) -> None:
        """Before the first row of a run: what a killed one left half written goes."""
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, in one piece, and keep it."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")
        self.by_key[row["key"]] = row
