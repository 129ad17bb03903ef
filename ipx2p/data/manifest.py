"""Manifests: lists of pairs, from ten to millions (layer 2).

A manifest is JSON lines, one pair each, paths relative to the file, one instruction or a list:
{"source": "a.png", "target": "b.png", "instruction": "derain the image", "task": "derain"}

`read_lines` reads one from top to bottom. Training picks pairs by number, with `Manifest`: it
checks every line once and keeps where each begins and hashes of its content. An index file beside
the manifest stores these, valid until the manifest changes. Lines are parsed at each visit.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ipx2p.errors import InputError
from ipx2p.files import atomic_write, digest_file, hash_bytes, remove_stale_temporaries

FORMAT = 1  # of the index file, and of the hashes in it
MIN_INDEXED = 10_000  # checking a shorter manifest again takes no time
DECODER = json.JSONDecoder()
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPLITS = ("train", "val", "test")  # a manifest for each, SPLIT.jsonl
CAPTIONS = ("source_caption", "target_caption")
KNOWN = {"source", "target", "task", "instruction", "group", *CAPTIONS}


class Record(NamedTuple):
    """One pair as a manifest lists it; paths are relative to the manifest's folder.

    instructions: every sentence that fits, at least one. group: a source picture or a scene, whose
    pairs stay in one split. split: as published, None if there is none. digests: of the two files,
    known while a set is made. extra: other keys of the line, which mixing keeps.
    """

    source: str
    target: str
    task: str
    instructions: Sequence[str]
    group: str | None = None
    source_caption: str | None = None
    target_caption: str | None = None
    split: str | None = None
    digests: Sequence[str] = ()
    extra: Mapping[str, Any] | None = None

    @property
    def instruction(self) -> str | Sequence[str]:
        """The instructions as a line holds them: a list, or the only one."""
        return self.instructions if len(self.instructions) > 1 else self.instructions[0]

    def line(self) -> str:
        """The pair as a line of a manifest."""
        values = {key: getattr(self, key) for key in ("source", "target", "instruction", "task")}
        for key in ("group", *CAPTIONS):
            if getattr(self, key) is not None:
                values[key] = getattr(self, key)
        return json.dumps(values | (self.extra or {}), ensure_ascii=False)


class Line(NamedTuple):
    """A line of a manifest: its number from 1, its bytes begin..end, and its pair or the error."""

    path: Path
    number: int
    begin: int
    end: int
    record: Record | None
    error: str = ""

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path} line {self.number}"

    @property
    def pictures(self) -> tuple[Path, Path]:
        """Source and target."""
        return self.path.parent / self.record.source, self.path.parent / self.record.target


def read_lines(path: Path, *, keep_bad: bool = False) -> Iterator[Line]:
    """The lines of a manifest that are not blank.

    Args:
        keep_bad: yield bad lines too, with their error.
    Raises: InputError for a file that cannot be read, and for a bad line, which it names.
    """
    try:
        with open(path, "rb") as file:
            end = 0
            for number, text in enumerate(file, 1):
                begin, end = end, end + len(text)
                if number == 1 and text.startswith(BYTE_ORDER_MARK):
                    begin += len(BYTE_ORDER_MARK)
                    text = text[len(BYTE_ORDER_MARK) :]
                if not text.strip():
                    continue
                record, error = None, ""
                try:
                    record = parse(text.decode())
                except UnicodeDecodeError as what:
                    error = f" is not UTF-8 text: {what}"
                except InputError as what:
                    error = str(what)
                line = Line(path, number, begin, end, record, error)
                if error and not keep_bad:
                    raise InputError(f"{line.where}{error}")
                yield line
    except FileNotFoundError:
        raise InputError(f"manifest {path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read manifest {path}: {error.strerror}") from error


class Index(NamedTuple):
    """What is kept of the N lines that list pairs.

    offsets: of their first bytes, and the end of the last, (N + 1,). lines: their numbers, counted
    from 1, (N,). tasks: the different ones, in order of appearance. task_ids: into them, (N,).
    pictures: `hash64` of source, target and task, (N,); sentences: of the instructions, (N,).
    """

    offsets: np.ndarray
    lines: np.ndarray
    tasks: np.ndarray
    task_ids: np.ndarray
    pictures: np.ndarray
    sentences: np.ndarray


class Manifest:
    """The records of a manifest, all checked when it is opened. InputError names a bad line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self.index: Index = _read_index(self.path) or _make_index(self.path)
        self.tasks: list[str] = self.index.tasks.tolist()

    def __len__(self) -> int:
        return len(self.index.lines)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptor": None}  # every process opens the file itself

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def __getitem__(self, item: int) -> Record:
        """The record of this number. InputError if the file has changed since it was opened."""
        begin, end = self.index.offsets[item : item + 2].tolist()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            # Unlike seek and read, this works in several processes that share the descriptor.
            text = os.pread(self._descriptor, end - begin, begin)
        except OSError as error:
            raise InputError(f"cannot read manifest {self.path}: {error.strerror}") from error
        with suppress(ValueError):
            record = parse(text.partition(b"\n")[0].decode())
            hashes = hash64(record[:3]), hash64(record.instructions)
            noted = self.index.pictures[item], self.index.sentences[item]
            if hashes == tuple(value.tobytes() for value in noted):
                return record
        raise InputError(f"{self.where(item)}: the file changed after it was opened: start again")

    def task(self, item: int) -> str:
        """The task of a record, without reading it."""
        return self.tasks[self.index.task_ids[item]]

    def where(self, item: int) -> str:
        """File and line of a record, for messages."""
        return f"{self.path} line {self.index.lines[item]}"


def hash64(strings: Iterable[str]) -> bytes:
    """8 bytes that tell lists of strings apart; strings without null characters."""
    return hash_bytes("\0".join(strings).encode(), 8)


def parse(line: str) -> Record:
    """One line as a record. InputError says what is wrong; the caller adds file and number."""
    line = line.strip()
    try:
        values, end = DECODER.raw_decode(line)  # `json.loads` takes twice as long
        if end < len(line):
            raise ValueError(f"something follows the object: {line[end : end + 20]!r}")
    except (ValueError, RecursionError) as error:
        raise InputError(f" is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f" holds a {type(values).__name__}, expected an object")
    for key in ("source", "target", "task"):
        value = values.get(key)
        if not isinstance(value, str) or not value:
            raise InputError(f": {key!r} is {value!r}, expected a string")
        if value[0] == "/" and key != "task":
            raise InputError(
                f": {key!r} is the absolute path {value}: write it relative to the folder of the "
                "manifest"
            )
    instruction = values.get("instruction")
    sentences = instruction if isinstance(instruction, list) else [instruction]
    for text in sentences or [None]:
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f": 'instruction' is {instruction!r}, expected a sentence or a list of sentences"
            )
    if "\\" in line:
        _check_text(values)
    get, group = values.get, values.get("group")
    return Record(
        values["source"],
        values["target"],
        values["task"],
        tuple(sentences),
        group if group is None else str(group),
        get("source_caption"),
        get("target_caption"),
        extra=None if values.keys() <= KNOWN else {k: values[k] for k in values if k not in KNOWN},
    )


def _check_text(values: dict[str, Any]) -> None:
    """Refuse what JSON escapes allow but text does not: half a character, null."""
    for key in values:
        value = values[key] if key in KNOWN else json.dumps(values[key], ensure_ascii=False)
        text = f"{key}{''.join(value) if isinstance(value, list) else value}"
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f": {key!r} is not valid Unicode text: {values[key]!a}") from None
        if "\0" in text:
            raise InputError(f": {key!r} has a null character: {values[key]!a}")


def _make_index(path: Path) -> Index:
    """Read and check a manifest, and store what was found for the next time."""
    offsets, lines, task_ids = array("q"), array("q"), array("i")
    tasks: dict[str, int] = {}
    hash_sentences = lru_cache(1024)(hash64)  # many lines share their sentences
    pictures, sentences = bytearray(), bytearray()
    # Before reading, so that a change from now on makes the index stale.
    key = _key(path) if path.exists() else ""
    for line in read_lines(path):
        offsets.append(line.begin)
        lines.append(line.number)
        task_ids.append(tasks.setdefault(line.record.task, len(tasks)))
        pictures += hash64(line.record[:3])
        sentences += hash_sentences(line.record.instructions)
    if not lines:
        raise InputError(f"manifest {path} lists no pairs")
    offsets.append(line.end)
    names, ids = np.array([*tasks]), np.array(task_ids, np.int32)
    hashes = (np.frombuffer(bytes(part), np.uint64) for part in (pictures, sentences))
    index = Index(np.array(offsets), np.array(lines), names, ids, *hashes)
    if len(lines) >= MIN_INDEXED:
        remove_stale_temporaries(path.parent)
        with suppress(InputError), atomic_write(_index_path(path)) as temporary:
            np.savez(temporary, key=key, **index._asdict())
    return index


def _read_index(path: Path) -> Index | None:
    """The index that was stored earlier; None if it is missing, damaged or stale."""
    try:
        with np.load(_index_path(path), allow_pickle=False) as arrays:
            is_current = arrays["key"].item() == _key(path)
            index = Index(*(arrays[name] for name in Index._fields))
    except Exception:  # formats and checksums break in many ways
        return None
    return index if is_current else None


def _index_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.index.npz")


def _key(path: Path) -> str:
    """What a stored index must carry to be valid."""
    return f"{FORMAT} {digest_file(path)}"
