"""Files that `torch.save` wrote, read without running their code (layer 0).

Two formats: zip archives, and the stream of pickles of torch < 1.6. The pickle itself is run by
`unpickle.py`. Tensors of an archive are memory-mapped, so only those in use take memory; those of
the old format are copied, since nothing aligns them.
"""

import io
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ipx2p.errors import InputError
from ipx2p.tensor_files.unpickle import MALFORMED, Refused, Storage, unpickle

ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # inside the first of its pickles
ALIGNMENT = 16  # bytes, the largest element of any dtype
INFLATED_PICKLE = 2**24  # bytes; torch never compresses, so a compressed pickle is suspect
INFLATED_FREE, INFLATED_RATIO = 2**28, 20  # bytes, and bytes per byte of the file: all storages


def _bytes(data: mmap.mmap | bytearray, start: int, size: int) -> Tensor:
    """A part of `data` as a 1-D uint8 tensor that keeps it alive."""
    if not 0 <= start <= start + size <= len(data):
        raise EOFError("it ends too early")
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8, offset=start, count=size)


class _Archive:
    """A checkpoint in a zip archive: FOLDER/data.pkl, and a storage in each FOLDER/data/KEY."""

    def __init__(self, file: BinaryIO, data: mmap.mmap) -> None:
        self.zip, self.data, self.storages = zipfile.ZipFile(file), data, {}
        self.room = INFLATED_FREE + INFLATED_RATIO * len(data)
        self.entries = {entry.filename: entry for entry in self.zip.infolist()}
        if any(name.rpartition("/")[2] == "constants.pkl" for name in self.entries):
            raise Refused("a TorchScript program: save the state dict of its model with torch.save")
        pickles = [name for name in self.entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            found = f"a zip archive with {len(pickles)} data.pkl"
            raise Refused(f"{found}, a torch checkpoint has one: unpack it, give the file inside")
        self.folder = pickles[0].removesuffix("data.pkl")

    def load(self) -> object:
        order = self.read("byteorder") if f"{self.folder}byteorder" in self.entries else b"little"
        if order != sys.byteorder.encode():
            raise Refused(f"its bytes are {order!r:.20}, not {sys.byteorder}: save it again here")
        return unpickle(
            io.BytesIO(self.read("data.pkl")), self.find_storage, file_size=len(self.data)
        )

    def read(self, name: str) -> bytes:
        entry = self.entries[self.folder + name]
        if entry.compress_type != zipfile.ZIP_STORED and entry.file_size > INFLATED_PICKLE:
            raise Refused(f"a zip bomb: its {name} would grow to {entry.file_size} bytes")
        return self.content(entry).numpy().tobytes()

    def find_storage(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        entry = self.entries[f"{self.folder}data/{key}"]
        if not 0 <= entry.file_size - numel * dtype.itemsize < dtype.itemsize:
            found = f"{entry.file_size} bytes instead of {numel} values of {dtype}"
            raise Refused(f"damaged, its storage {key!r:.80} has {found}: download it again")
        if key not in self.storages:
            self.room -= entry.file_size
            if self.room < 0:
                raise Refused("a zip bomb: its storages would grow to many times its size")
            self.storages[key] = self.content(entry)
        return self.storages[key]

    def content(self, entry: zipfile.ZipInfo) -> Tensor:
        """The bytes of an entry, 1-D uint8: mapped if stored and aligned, else read."""
        if entry.flag_bits & 1:
            raise Refused("an encrypted zip archive: unpack it with its password first")
        if entry.compress_type == zipfile.ZIP_STORED:
            self.data.seek(entry.header_offset)
            magic, name_size, extra_size = struct.unpack("<4s22x2H", self.data.read(30))
            if magic != ZIP_START:
                raise zipfile.BadZipFile("an entry is not where the zip directory says")
            start = self.data.tell() + name_size + extra_size
            content = _bytes(self.data, start, entry.file_size)
            return content.clone() if start % ALIGNMENT else content
        if entry.compress_type != zipfile.ZIP_DEFLATED:
            raise Refused("an unusual compression: pack it again without compression")
        with self.zip.open(entry) as file:
            return _bytes(bytearray(file.read(entry.file_size)), 0, entry.file_size)


class _Legacy:
    """A checkpoint of torch before 1.6: three small pickles, the object, keys and storages.

    The object names its storages before their bytes follow, so they are filled in afterwards.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.storages, self.room = data, {}, len(data)

    def load(self) -> object:
        for _ in range(3):  # the magic number, the version (always 1001), the writer's C types
            self.unpickle()
        value = self.unpickle(self.find_storage)
        for key in self.unpickle():
            storage = self.storages.pop(key if type(key) is str else None)
            (numel,) = struct.unpack("<q", self.data.read(8))
            if numel * storage.dtype.itemsize != len(storage.data):
                raise Refused(f"damaged, the size of its storage {key!r:.80} is given differently")
            storage.data.copy_(_bytes(self.data, self.data.tell(), len(storage.data)))
            self.data.seek(len(storage.data), os.SEEK_CUR)
        if self.storages:
            raise Refused(f"damaged, it lacks {len(self.storages)} of its storages")
        return value

    def unpickle(self, find_storage: Callable | None = None) -> object:
        return unpickle(self.data, find_storage, file_size=len(self.data))

    def find_storage(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        size = numel * dtype.itemsize
        if key not in self.storages:
            self.room -= size
            if self.room < 0:
                raise EOFError("it ends too early")
            self.storages[key] = Storage(torch.zeros(size, dtype=torch.uint8), dtype)
        if len(self.storages[key].data) != size:
            raise Refused(f"damaged, its storage {key!r:.80} is given two sizes")
        return self.storages[key].data


def _other_kind(data: mmap.mmap) -> str:
    if data[257:262] == b"ustar":
        return "a tar archive, from torch before 0.2: load it with that version and save it again"
    if data[:1] == pickle.PROTO:
        return "a pickle that torch.save did not write: save its weights with torch.save"
    return f"not a torch checkpoint, it starts with {data[:16]!r}"


def read_checkpoint(path: Path) -> object:
    """Return the object in a file that `torch.save` wrote, as `unpickle` describes it.

    Raises: InputError if the file cannot be read, is damaged, or is no torch checkpoint.
    """
    try:
        with open(path, "rb") as file:
            # A private mapping: tensors may be written to, the file never is.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if data[:4] == ZIP_START:
                return _Archive(file, data).load()
            if LEGACY_MAGIC in data[:32]:
                return _Legacy(data).load()
            raise Refused(_other_kind(data))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Refused as error:
        other = "or use the same weights as safetensors"
        raise InputError(f"cannot read {path}: {error} ({other})") from error
    except MALFORMED as error:
        reason = " ".join(f"{type(error).__name__}: {error}"[:200].split())
        found = f"damaged or cut short, or not a torch checkpoint ({reason})"
        raise InputError(f"cannot read {path}: {found}: download it again") from error
