"""Files that are whole or not there: atomic writes and JSON (layer 0, standard library only)."""

import errno
import fcntl
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from ipx2p.errors import InputError

PATIENCE_S = 1.0  # with a lock that is held


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; at the end it replaces `path`.

    It is flushed to disk first, so `path` is at any time the earlier file or the whole new one. If
    the block or the disk fails, the temporary file is removed. Folders are made as needed.

    Raises: InputError that says why `path` cannot be written.
    """
    path = Path(path)
    if "\0" in str(path):
        raise InputError(f"cannot write {str(path)!r}: a null byte is in the name")
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask says; some writers restrict it
        yield temporary
        temporary.chmod(mode)
        flush_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system flushes folders
        flush_to_disk(path.parent)


def digest_bytes(data: bytes) -> str:
    """The content of a file as 32 hexadecimal digits."""
    return blake2b(data, digest_size=16).hexdigest()


def digest_file(path: str | Path) -> str:
    """Likewise, of a file of any size. InputError says why it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = blake2b(digest_size=16)
            while chunk := file.read(1 << 20):
                content.update(chunk)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}): check the path") from error
    return content.hexdigest()


def check_writable(folder: str | Path) -> None:
    """Make the folder and try it out, so that hours of work do not end in nowhere.

    Raises: InputError when files cannot be written there.
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
    """Take a lock file for this process, as long as what is returned stays open.

    Returns: None where another process holds it, also after the moment that a killed one may need.
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
    """Return when the file, or the folder's list of names, is on the disk itself."""
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


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split())
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{error.strerror}: {'free some space' if full else 'choose another place'}"
