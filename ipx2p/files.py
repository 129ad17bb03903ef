"""Atomic writes, JSON, CSV, and hashes of content (layer 0, standard library only).

Every hash of the package is made here, with BLAKE2b. Seeds, splits, caches and indices on disk are
built from these values, so they must never change.
"""

import errno
import fcntl
import json
import os
import platform
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from ipx2p.errors import InputError, WriteError

PATIENCE_S = 1.0  # how long to wait for a lock
DAY_S = 86_400
TEMPORARY = re.compile(r"\.(?:([0-9a-f]{8})-(\d+)-)?[0-9a-f]{16}(?:\..*)?")  # machine, process
FORMULA = re.compile(r"'*[=+\-@\t\r\n]")  # how text begins that a spreadsheet would compute


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; at the end it replaces `path`.

    It is flushed to disk first, so `path` is always the earlier file or the whole new one. If
    the block or the disk fails, the temporary file is removed. Folders are made as needed.

    Raises: InputError that says why `path` cannot be written.
    """
    path = Path(path)
    if "\0" in str(path):
        raise InputError(f"cannot write {str(path)!r}: a null byte is in the name")
    owner = f"{_machine()}-{os.getpid()}"
    temporary = path.with_name(f".{owner}-{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask says; some writers restrict it
        yield temporary
        temporary.chmod(mode)
        flush_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system flushes folders
        flush_to_disk(path.parent)


def remove_stale_temporaries(folder: str | Path) -> None:
    """Remove what `atomic_write` left in a folder when its process was killed.

    Files of processes that still run stay. Those of other machines, whose processes cannot be
    looked up, are removed when nothing has been written to them for a day.
    """
    for path in Path(folder).glob(".*"):
        if match := TEMPORARY.fullmatch(path.name):
            machine, process = match.groups()
            with suppress(OSError):  # another process may remove it at the same time
                is_old = time.time() - path.stat().st_mtime > DAY_S
                if is_old if machine != _machine() else not _is_running(int(process)):
                    path.unlink()


def _machine() -> str:
    try:  # containers may share the name of their host, but see only their own processes
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return digest_bytes(f"{platform.node()} {processes}".encode(), 4)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # it runs, and is another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def hasher(size: int = 64) -> blake2b:
    """A hash of `size` bytes that is fed piece by piece, with `update`."""
    return blake2b(digest_size=size)


def hash_bytes(data: bytes, size: int) -> bytes:
    """A hash of `size` bytes."""
    return blake2b(data, digest_size=size).digest()


def digest_bytes(data: bytes, size: int = 16) -> str:
    """A hash of `size` bytes in hexadecimal digits, 32 by default."""
    return hash_bytes(data, size).hex()


def digest_file(path: str | Path) -> str:
    """`digest_bytes` of a file of any size. InputError says why it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = hasher(16)
            while chunk := file.read(1 << 20):
                content.update(chunk)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}): check the path") from error
    return content.hexdigest()


def check_writable(folder: str | Path) -> None:
    """Make the folder and test it, before hours of work depend on it.

    Raises: InputError if files cannot be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {_reason(error)}") from error


def check_picture_file(path: Path) -> None:
    """Raise InputError for a path that is no file with something in it."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # missing, no permission, null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}): check the path") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise InputError(f"{path}: is {kind}, expected a picture file")
    if status.st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes), expected a picture: fetch it again")


def hold_lock(path: Path) -> BinaryIO | None:
    """Lock a file for this process, until the file that is returned is closed.

    Returns: None if another process holds the lock for longer than a killed one needs to end.
    """
    lock = open(path, "wb")  # noqa: SIM115, the caller keeps it open
    until = time.monotonic() + PATIENCE_S
    while True:
        try:  # a record lock, unlike flock's, ends with this process and not with its workers
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError as error:
            is_held = error.errno in (errno.EACCES, errno.EAGAIN)
            if is_held and time.monotonic() < until:
                time.sleep(0.05)
                continue
            lock.close()
            if not is_held:  # a file system without locks
                raise
            return None


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str | Path, kind: type = dict) -> Any:
    """Read one JSON object, or list. InputError names the file, and the line that is not JSON."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, kind):
        expected = "an object" if kind is dict else "a list"
        raise InputError(f"{path} holds a JSON {type(data).__name__}, expected {expected}")
    return data


def write_json(data: dict[str, Any], path: str | Path) -> None:
    """Write one JSON object, indented, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def csv_text(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """Rows by name of the column, as CSV that can be opened in a spreadsheet.

    Text that would be computed there as a formula (=, +, -, @, tab or a new line come first) gets
    an apostrophe in front, and one more if it has some already. To read it back, drop the first
    apostrophe of cells that match `FORMULA`. Numbers stay numbers.
    """

    def cell(value: Any) -> str:
        if value is None or isinstance(value, (int, float)):
            return "" if value is None else str(value)
        text = f"'{value}" if FORMULA.match(str(value)) else str(value)
        # The standard library writes a lone carriage return without quotes.
        return '"' + text.replace('"', '""') + '"' if re.search('[,"\r\n]', text) else text

    lines = [columns, *([row.get(name) for name in columns] for row in rows)]
    return "".join(",".join(map(cell, line)) + "\n" for line in lines)


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split())
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{error.strerror}: {'free some space' if full else 'choose another place'}"
