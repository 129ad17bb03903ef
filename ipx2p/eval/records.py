"""Records: every finished edit as one line of JSON that tells all about it (layer 4).

A record holds the case, the model and its settings, the cost, the picture and the scores. Reports
read records and pictures, and nothing else: no weights, no manifest, no original photographs.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ipx2p.errors import InputError
from ipx2p.files import digest_bytes, digest_file

MAX_SLUG = 60  # characters of each part of a file name
STEM = "records"
IDENTITY, ORACLE, VAE, CLASSICAL = BUILT_IN = ("identity", "oracle", "vae", "classical")


def key_of(content: Any) -> str:
    """A hash of anything that JSON can hold; equal contents have equal keys."""
    text = json.dumps(content, sort_keys=True)
    return digest_bytes(text.encode(), 12)


def file_stem(*parts: str) -> str:
    """A file name from texts, with a hash to tell apart those that are alike when cut."""
    slugs = (re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:MAX_SLUG] for text in parts)
    return "_".join([*slugs, key_of([*parts])[:6]])


@dataclass(frozen=True)
class Record:
    """One edit of one case by one model, or a built-in row of the case.

    key: a hash of everything that shapes the record. edit: likewise of its picture, which several
    records may share: guidance that is the same at some scales, cases that differ in their target.
    case: its `name`, `group` (pictures of one photograph are one sample of the statistics), `task`,
    `instruction`, `source`, `target`, `source_caption`, `target_caption`, `benchmark`.
    model: its name in tables, or one of `BUILT_IN`: the source, the target, the target through the
    autoencoder, a method without learning.
    settings: those of `EditSettings`, None for scales without effect, with `guidance_in_full` and
    the scales at which ip2p is the same, `effective_guidance_scale` and
    `effective_image_guidance_scale`; None for built-in rows.
    made_with: weights and their digest, code, resolution, dtype, negative instruction.
    picture: `file` in the folder, `digest`, `width`, `height`; None if the edit is not finite.
    computed_on: device, threads, versions, batch.
    scores: by metric. scored_by: how, for metrics that depend on it: model and preprocessing.
    selects: whether its scores choose the scales, and are not reported.
    folder: where it was read.
    """

    key: str
    edit: str
    case: dict[str, Any]
    model: str
    settings: dict[str, Any] | None
    seed: int | None
    made_with: dict[str, Any]
    picture: dict[str, Any] | None
    evaluations: int = 0
    seconds: float = 0.0
    computed_on: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    scored_by: dict[str, str] = field(default_factory=dict)
    selects: bool = False
    folder: Path = Path()

    @property
    def path(self) -> Path:
        """Its picture."""
        return self.folder / self.picture["file"]

    @property
    def is_there(self) -> bool:
        """Whether its picture is as it was written, or cannot be."""
        if self.picture is None:
            return True
        return self.path.is_file() and digest_file(self.path) == self.picture["digest"]

    def line(self) -> str:
        """The record as a line of JSON."""
        values = asdict(self)
        del values["folder"]
        return json.dumps(values)


NAMES = {item.name for item in fields(Record)} - {"folder"}


class Records:
    """The records of all processes, FOLDER/records_RANK.jsonl; each appends to its own file.

    Later scores of a record are a new line of the same key, which is joined with the earlier ones.
    An incomplete last line is ignored.

    Raises: InputError for a file with damaged lines before the last.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.file = folder / f"{STEM}_{rank:03d}.jsonl"
        self.by_key: dict[str, Record] = {}
        if self.file.exists():  # drop a line that a killed run left half written
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        self.read()

    def read(self) -> None:
        """Read the records that any process has written."""
        for record in read_records(self.folder):
            self._keep(record)

    def add(self, record: Record) -> None:
        """Write one record, in one piece, and keep it."""
        with open(self.file, "ab", buffering=0) as file:
            file.write(record.line().encode() + b"\n")
        self._keep(replace(record, folder=self.folder))

    def _keep(self, record: Record) -> None:
        self.by_key[record.key] = joined(self.by_key.get(record.key), record)


def joined(earlier: Record | None, later: Record) -> Record:
    """The later one of two records of a key, with the scores of both if the picture is the same."""
    if earlier is None or earlier.picture != later.picture:
        return later
    return replace(
        later,
        scores=earlier.scores | later.scores,
        scored_by=earlier.scored_by | later.scored_by,
    )


def read_records(folder: Path) -> list[Record]:
    """All lines of a folder, in order.

    Raises: InputError for a damaged line.
    """
    found = []
    for path in sorted(folder.glob(f"{STEM}_*.jsonl")):
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                known = {name: value for name, value in values.items() if name in NAMES}
                found.append(Record(**known, folder=folder))
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path} line {number} is damaged ({error}): remove the line, and its edit is "
                    "computed again"
                ) from error
    return found


def read_folders(folders: Sequence[Path]) -> list[Record]:
    """The records of finished runs, each once.

    Raises: InputError for a folder without any.
    """
    by_key: dict[str, Record] = {}
    for folder in folders:
        records = read_records(folder)
        if not records:
            raise InputError(
                f"{folder} holds no records ({STEM}_*.jsonl): expected the --output of compare or "
                "evaluate"
            )
        for record in records:
            by_key[record.key] = joined(by_key.get(record.key), record)
    return [*by_key.values()]


def names_of(records: Iterable[Record]) -> list[str]:
    """The metrics that any of them has."""
    return [*dict.fromkeys(name for record in records for name in record.scores)]
