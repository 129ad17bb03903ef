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
from ipx2p.fidelity import PLAIN
from ipx2p.files import digest_bytes, digest_file

MAX_SLUG = 60  # characters of each part of a file name
STEM = "records"
BUILT_IN = ("identity", "oracle", "vae", "classical")
IDENTITY, ORACLE, VAE_ROW, CLASSICAL_ROW = BUILT_IN
# What tells apart rows of one name, and how tables call it.
MADE = {
    "weights_digest": "weights",
    "resolution": "resolution",
    "dtype": "dtype",
    "negative_instruction": "negative instruction",
    "weak_digest": "weak weights",
}

# In settings of records that are older than these.
FORMERLY = {"fidelity": PLAIN, "fidelity_in_full": PLAIN, "window": 0}


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
    `instruction`, `source` and `target` with their digests, `source_caption`, `target_caption`,
    `benchmark`, `is_step` (made only for the case after it).
    model: its name in tables, or one of `BUILT_IN`: the source, the target, the target through the
    autoencoder, a method without learning.
    settings: those of `EditSettings`, None for scales without effect, with `guidance_in_full`,
    `fidelity_in_full` and the scales at which ip2p is the same, `effective_guidance_scale` and
    `effective_image_guidance_scale`; None for built-in rows.
    made_with: weights and their digest, code, resolution, dtype, negative instruction.
    made_at, scored_at: seconds since 1970.
    picture: `file` in the folder, `digest`, `width`, `height`; None if the edit is not finite.
    failed: why there is no picture.
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
    failed: str = ""
    made_at: float = 0.0
    scored_at: float = 0.0
    evaluations: float = 0
    seconds: float = 0.0
    computed_on: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    scored_by: dict[str, str] = field(default_factory=dict)
    selects: bool = False
    folder: Path = Path()

    @property
    def row(self) -> tuple[str, str, tuple[str, ...]]:
        """Equal for records of one line of the table: model, settings, and how edits were made."""
        how = (self.made_with.get(name) for name in MADE)
        settings = json.dumps(self.settings, sort_keys=True)
        return self.model, settings, tuple("" if one is None else str(one) for one in how)

    @property
    def place(self) -> str:
        """Equal for records of which only the last counts: made again, by other code."""
        return key_of([self.about, self.row, self.seed, self.selects])

    @property
    def about(self) -> dict[str, Any]:
        """Its case without paths: the same pictures may be moved."""
        paths = ("source", "target")
        return {name: value for name, value in self.case.items() if name not in paths}

    @property
    def size(self) -> str:
        """Of its picture, for messages."""
        return f"{self.picture['width']} x {self.picture['height']}"

    @property
    def path(self) -> Path:
        """Its picture."""
        return self.folder / self.picture["file"]

    @property
    def has_picture(self) -> bool:
        """Whether its picture is as it was written; one that failed needs none."""
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
    An incomplete last line is ignored. Records whose picture is lost or damaged do not count.

    Raises: InputError for a file with damaged lines before the last.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.file = folder / f"{STEM}_{rank:03d}.jsonl"
        if self.file.exists():  # drop a line that a killed run left half written
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        self.by_key: dict[str, Record]
        self.by_edit: dict[str, Record]
        self.lost: set[tuple[str, float]] = set()
        self.read()
        whole: dict[str, bool] = {}
        for record in self.by_key.values():
            if record.edit not in whole:
                whole[record.edit] = record.has_picture
            if not whole[record.edit]:
                self.lost.add((record.edit, record.made_at))
        self.read()

    def read(self) -> None:
        """Read the records that any process has written."""
        self.by_key, self.by_edit = {}, {}
        for record in read_records(self.folder):
            self._keep(record)

    def add(self, record: Record) -> None:
        """Write one record, in one piece, and keep it."""
        with open(self.file, "ab", buffering=0) as file:
            file.write(record.line().encode() + b"\n")
        self._keep(replace(record, folder=self.folder))

    def _keep(self, record: Record) -> None:
        if (record.edit, record.made_at) not in self.lost:
            record = joined(self.by_key.get(record.key), record)
            self.by_key[record.key] = self.by_edit[record.edit] = record


def joined(one: Record | None, other: Record) -> Record:
    """Two records of a key, the other written later: it, with the scores of both."""
    if one is None or one.made_at < other.made_at:
        return other
    scores, scored_by = one.scores | other.scores, one.scored_by | other.scored_by
    return replace(other, scores=scores, scored_by=scored_by)


def read_records(folder: Path) -> list[Record]:
    """All lines of a folder, in the order in which they were written.

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
                if known.get("settings"):
                    known["settings"] = {**FORMERLY, **known["settings"]}
                record = Record(**known, folder=folder)
                for name in ("case", "made_with", "scores", "scored_by", "computed_on"):
                    if not isinstance(getattr(record, name), dict):
                        raise TypeError(f"{name} is no object")
                found.append(record)
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path} line {number} is damaged ({error}): remove the line, and its edit is "
                    "computed again"
                ) from error
    return sorted(found, key=in_time)


def in_time(record: Record) -> tuple[float, float]:
    """The order in which records were written."""
    return record.made_at, record.scored_at


def read_folders(folders: Sequence[Path]) -> list[Record]:
    """The records of runs that are reported; of those that were made again, the last.

    Raises: InputError for a folder without any, or folders in which a case has other sizes.
    """
    by_key: dict[str, Record] = {}
    everything: list[Record] = []
    for folder in folders:
        records = read_records(folder)
        if not records:
            raise InputError(
                f"{folder} holds no records ({STEM}_*.jsonl): expected the --output of compare or "
                "evaluate"
            )
        everything += records
    for record in sorted(everything, key=in_time):
        by_key[record.key] = joined(by_key.get(record.key), record)
    shown = [record for record in by_key.values() if not record.case.get("is_step")]
    last: dict[str, Record] = {}
    for record in sorted(shown, key=in_time):
        earlier = last.setdefault(record.place, record)
        if record.model == IDENTITY and earlier.size != record.size:
            raise InputError(
                f"{record.case['name']} is compared at {earlier.size} pixels in {earlier.folder} "
                f"and at {record.size} in {record.folder}: such numbers do not compare: report "
                "the folders apart"
            )
        last[record.place] = record
    return [*last.values()]


def names_of(records: Iterable[Record]) -> list[str]:
    """The metrics that any of them has."""
    return [*dict.fromkeys(name for record in records for name in record.scores)]
