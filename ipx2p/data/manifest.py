"""Manifests: lists of pairs, a million lines as well as ten (layer 2).

A manifest is JSON lines, one pair each, paths relative to the file, one instruction or a list:
{"source": "a.png", "target": "b.png", "instruction": "derain the image", "task": "derain"}

The first opening reads and checks every line, and keeps arrays: where each line begins, and hashes
of what it says. A file beside the manifest holds them for the next time; it is believed as long as
the content of the manifest is the same. A line is parsed again whenever its pair is visited.
"""

import json
import os
from array import array
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ipx2p.errors import InputError
from ipx2p.files import atomic_write, hash_bytes, hasher

FORMAT = 1  # of the index file, and of the hashes in it
MIN_INDEXED = 10_000  # a shorter manifest is checked anew in no time
DECODER = json.JSONDecoder()
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One line of a manifest; paths as they are written there."""

    source: str
    target: str
    task: str
    instructions: tuple[str, ...]


class Index(NamedTuple):
    """What is kept of the N lines that list pairs.

    offsets: of their first bytes, and the end of the file, (N + 1,). lines: their numbers, counted
    from 1, (N,). tasks: the different ones, as they come. task_ids: which of them, (N,).
    pictures: `hash64` of source, target and task, (N,); sentences: of the instructions, (N,).
    """

    offsets: np.ndarray
    lines: np.ndarray
    tasks: np.ndarray
    task_ids: np.ndarray
    pictures: np.ndarray
    sentences: np.ndarray


class Manifest:
    """The records of a manifest, checked whole when it is opened, read one by one.

    Raises: InputError that names the file, the line, and what is wrong in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        try:
            index = _read_index(self.path)
            if index is None:
                index = _make_index(self.path)
        except FileNotFoundError:
            raise InputError(f"manifest {path} does not exist") from None
        except OSError as error:
            raise InputError(f"cannot read manifest {path}: {error.strerror}") from error
        self.index: Index = index
        self.tasks: list[str] = index.tasks.tolist()

    def __len__(self) -> int:
        return len(self.index.lines)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptor": None}  # every process opens the file by itself

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def __getitem__(self, item: int) -> Record:
        """The record of this number.

        Raises: InputError if the file is no longer what it was.
        """
        begin, end = self.index.offsets[item : item + 2].tolist()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            # Unlike seek and read, this can be done by several processes that share the file.
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
    """One line as a record.

    Raises: InputError that says what is wrong in the line, to be put behind its place.
    """
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
    return Record(values["source"], values["target"], values["task"], tuple(sentences))


def _check_text(values: dict[str, Any]) -> None:
    """Refuse what an escape of JSON can name and no text holds: half a character, null."""
    for key in ("source", "target", "task", "instruction"):
        text = "".join(values[key])
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f": {key!r} is not valid Unicode text: {values[key]!a}") from None
        if "\0" in text:
            raise InputError(f": {key!r} has a null character: {values[key]!a}")


def _make_index(path: Path) -> Index:
    """Read and check a manifest, and note for the next time what was found."""
    content = hasher()
    offsets, lines, task_ids = array("q"), array("q"), array("i")
    tasks: dict[str, int] = {}
    hash_sentences = lru_cache(1024)(hash64)  # many lines say the same
    pictures, sentences = bytearray(), bytearray()
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content.update(line)
            begin, offset = offset, offset + len(line)
            if number == 1 and line.startswith(BYTE_ORDER_MARK):
                begin += len(BYTE_ORDER_MARK)
                line = line[len(BYTE_ORDER_MARK) :]
            if not line.strip():
                continue
            try:
                record = parse(line.decode())
            except UnicodeDecodeError as error:
                raise InputError(f"{path} line {number} is not UTF-8 text: {error}") from None
            except InputError as error:
                raise InputError(f"{path} line {number}{error}") from None
            offsets.append(begin)
            lines.append(number)
            task_ids.append(tasks.setdefault(record.task, len(tasks)))
            pictures += hash64(record[:3])
            sentences += hash_sentences(record.instructions)
    if not lines:
        raise InputError(f"manifest {path} lists no pairs")
    offsets.append(offset)
    names, ids = np.array([*tasks]), np.array(task_ids, np.int32)
    hashes = (np.frombuffer(bytes(part), np.uint64) for part in (pictures, sentences))
    index = Index(np.array(offsets), np.array(lines), names, ids, *hashes)
    if len(lines) >= MIN_INDEXED:
        with suppress(InputError), atomic_write(_index_path(path)) as temporary:
            np.savez(temporary, key=_key(content.digest()), **index._asdict())
    return index


def _read_index(path: Path) -> Index | None:
    """What an earlier opening has noted; None where that is missing, damaged or out of date."""
    try:
        with np.load(_index_path(path), allow_pickle=False) as arrays:
            key = arrays["key"]
            index = Index(*(arrays[name] for name in Index._fields))
    except Exception:  # a damaged file raises as variously as formats and checksums can break
        return None
    with path.open("rb") as file:
        is_current = np.array_equal(key, _key(_hash_content(file)))
    return index if is_current else None


def _index_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.index.npz")


def _key(content: bytes) -> np.ndarray:
    """What an index must have noted to be believed."""
    return np.frombuffer(bytes([FORMAT]) + content, np.uint8)


def _hash_content(file: BinaryIO) -> bytes:
    content = hasher()
    while chunk := file.read(2**20):
        content.update(chunk)
    return content.digest()
