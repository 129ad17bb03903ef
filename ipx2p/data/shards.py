"""Rows of tensors under keys, in safetensors files that are mapped into memory (layer 2).

A shard is a stack of rows that never changes once written; its header holds the keys of its rows
and a checksum of its tensors. There is no index: opening the folder finds all complete rows, even
after a write was killed.
"""

import json
import zlib
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.files import atomic_write, digest_bytes


class Shards:
    """The rows in a folder, which processes and runs may share; the first shard makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[Path, int]] = {}  # key -> shard and row
        self._written: dict[str, tuple[Path, int]] = {}  # by this process, not yet exchanged
        self._files: dict[Path, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}  # every process maps the files itself

    def open(self, world: World, wanted: Container[str]) -> None:
        """Find the wanted rows; a damaged shard is reported and removed.

        All processes must call it; all get what the first one finds.
        """
        self.places, self._files = {}, {}
        # Hidden files are being written by a run that shares the folder.
        paths = sorted(self.folder.glob("[!.]*.safetensors"))
        paths = world.gather(paths)[0]
        keys = world.merge([_read_keys(path, wanted) for path in world.share(paths)])
        for path, found in zip(paths, keys, strict=True):
            if found is None:
                world.print(f"warning: {path} is damaged: encoding its rows again")
                if world.is_main:
                    path.unlink(missing_ok=True)
                continue
            self.places |= {key: (path, row) for row, key in enumerate(found)}

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of one row. InputError if its file is gone."""
        path, row = self.places[key]
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            file = self._files[path]
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"cannot read {path}: {error}: start again to encode its rows again"
            ) from error

    def write(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add rows, all with the same names and shapes of tensors, as one shard; none add none."""
        if not rows:
            return
        keys = [*rows]
        names = sorted(rows[keys[0]])
        tensors = {name: torch.stack([rows[key][name] for key in keys]) for name in names}
        metadata = {"keys": json.dumps(keys), "checksum": str(_checksum(tensors, names))}
        path = self.folder / f"{make_key(*keys)}.safetensors"
        with atomic_write(path) as temporary:
            try:
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:  # raised if the disk is full
                raise OSError(str(error)) from error
        self._written |= {key: (path, row) for row, key in enumerate(keys)}

    def exchange(self, world: World) -> None:
        """Learn which rows all processes have written; all of them must call it."""
        for written in world.gather(self._written):
            self.places |= written
        self._written = {}


def make_key(*parts: object) -> str:
    """A key that depends on all the parts, which JSON can write."""
    return digest_bytes(json.dumps(parts).encode())


def _read_keys(path: Path, wanted: Container[str]) -> list[str] | None:
    """The keys of a shard's rows if any is wanted, None if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = json.loads(metadata["keys"])
            if path.stem != make_key(*keys):
                return None
            if not any(key in wanted for key in keys):
                return []
            names = sorted(file.keys())
            checksum = _checksum({name: file.get_tensor(name) for name in names}, names)
    except (SafetensorError, FileNotFoundError, ValueError, KeyError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return keys if metadata["checksum"] == str(checksum) else None


def _checksum(tensors: Mapping[str, Tensor], names: Iterable[str]) -> int:
    total = 0
    for name in names:
        total = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), total)
    return total


def check_finite(row: Mapping[str, Tensor], what: str) -> None:
    """Raise InputError for infinities and NaN."""
    for name, tensor in row.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"{what}: the {name} has values that are not finite in {tensor.dtype}: check the "
                "weights of the encoders"
            )


def missing(keys: Sequence[str], shards: Shards) -> list[int]:
    """The places in `keys` of rows that are missing, each different key once."""
    first = {key: place for place, key in reversed([*enumerate(keys)])}
    return sorted(place for key, place in first.items() if key not in shards)
