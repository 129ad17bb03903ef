"""Read and write named tensors, in files of any format (layer 0).

Reads: safetensors files, checkpoints of `torch.save` (`.bin`, `.ckpt`, `.pt`; see `torch_file.py`),
and indices of sharded files. The content decides, never the suffix, and no pickled code runs.
Tensors are memory-mapped, so only those in use take memory. A mapped file may be replaced while its
tensors live, as the writers here do, but must not be overwritten in place.
"""

import ctypes
import json
import mmap
import os
import pickle
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.files import atomic_write, hasher
from ipx2p.tensor_files.torch_file import ZIP_START, read_checkpoint
from ipx2p.tensor_files.unpickle import StandIn, entries

WEIGHTS_SUFFIXES = (  # in order of preference
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".fp16.safetensors",
    ".safetensors.index.fp16.json",
    ".fp16.bin",
    ".bin.index.fp16.json",
)
NETWORK_STEMS = ("diffusion_pytorch_model",)  # of a U-Net or VAE folder; see `find_weights`
TEXT_STEMS = ("model", "pytorch_model")  # of a text encoder folder: safetensors, bin
LFS_START = b"version https://git-lfs.github.com/spec/"
DTYPE_NAMES = {  # in safetensors files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
HEAD_SIZE = 512  # bytes that show what a file is
MADV_PAGEOUT = 21  # of Linux 5.4 and later; others refuse it, and memory stays as it is


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {path}: {error.strerror or error}")


def _shown(names: Iterable[str], limit: int = 3) -> str:
    """The first few of some names, cut and safe to print: they may come from a hostile file."""
    names = list(names)
    shown = [(name if name.isprintable() else ascii(name))[:120] for name in names[:limit]]
    return ", ".join(shown + ["..."] * (len(names) > limit)) or "nothing"


def _head(path: Path) -> bytes:
    """The first bytes of a file; InputError for what a failed download leaves."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot read {path}: a folder or device where a file is expected")
        with open(path, "rb") as file:
            head = file.read(HEAD_SIZE)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not head:
        raise InputError(f"{path} is empty: download it again")
    if head.startswith(LFS_START):
        raise InputError(f"{path} is a git-lfs pointer, not the weights: run git lfs pull")
    if not any(byte < 32 and byte not in b"\t\n\f\r" for byte in head):
        kind = "an HTML page" if head.lstrip()[:1] == b"<" else "text"
        raise InputError(f"{path} is {kind}, not weights ({head[:40]!r} ...): download it again")
    return head


def _read_file(path: Path) -> dict[str, Tensor]:
    head = _head(path)
    pickled = head.startswith((ZIP_START, pickle.PROTO))
    is_safetensors = head[8:9] == b"{" or (path.suffix == ".safetensors" and not pickled)
    return _read_safetensors(path) if is_safetensors else _read_state_dict(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in [*file.keys()]}
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        found = f"a damaged or cut short safetensors file ({error})"
        raise InputError(f"cannot read {path}: {found}: download it again") from error
    if not tensors:
        raise InputError(f"{path} holds no tensors: expected a state dict")
    return tensors


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    top = entries(read_checkpoint(path))
    held = entries(top["state_dict"]) if isinstance(top.get("state_dict"), dict) else top
    tensors = {key: value for key, value in held.items() if isinstance(value, Tensor)}
    for key, value in held.items():
        if isinstance(value, StandIn) and str(value.made_by).startswith("torch._utils._rebuild_"):
            found = _shown([f"{key} ({value.made_by})"])
            raise InputError(f"{path}: {found} is a kind of tensor that is not read here")
    if not tensors:
        raise InputError(
            f"{path} holds no named tensors, at its top level or under 'state_dict'; its top level "
            f"holds {_shown(top, limit=12)}: save the state dict of the model"
        )
    return tensors


def _read_shards(path: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        places = {key: str(name) for key, name in weight_map.items()}
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not an index of shards: expected a 'weight_map'") from error
    names = sorted(set(places.values()))
    if wrong := [name for name in names if Path(name).name != name]:
        raise InputError(f"{path} names files outside its folder: {_shown(wrong)}")
    if absent := [name for name in names if not (path.parent / name).exists()]:
        found = f"{len(absent)} of its {len(names)} shards are missing ({_shown(absent)})"
        raise InputError(f"{path}: {found}: download them")
    shards = {name: _read_file(path.parent / name) for name in names}
    if absent := [key for key, name in places.items() if key not in shards[name]]:
        found = f"{len(absent)} of its {len(places)} tensors are missing ({_shown(absent)})"
        raise InputError(f"{path}: {found} from the shards that it names: download them again")
    return {key: shards[name][key] for key, name in places.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a file of any format, or of all shards that an index names.

    Of a checkpoint, what `state_dict` holds if there is one, else the top level; entries that are
    not tensors (step counters, callbacks) are left out.
    Raises: InputError if the file is missing, damaged, not weights, or holds no named tensors.
    """
    path = Path(path)
    is_index = path.suffix == ".json" and ".index." in path.name
    return _read_shards(path) if is_index else _read_file(path)


def find_weights(folder: Path, stems: tuple[str, ...] = NETWORK_STEMS) -> Path:
    """Find the weights file, or the index of its shards, in a component folder of a weights folder.

    Raises: InputError that says what was looked for and what the folder holds.
    """
    try:
        held = sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(folder, error) from error
    for suffix in WEIGHTS_SUFFIXES:
        for stem in stems:
            if stem + suffix in held:
                return folder / (stem + suffix)
    raise InputError(
        f"no weights in {folder}: expected {' or '.join(stems)} with one of "
        f"{' '.join(WEIGHTS_SUFFIXES)}; the folder holds {_shown(held, limit=12)}"
    )


def check_fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are not, key by key, what is expected (meta tensors will do).

    Raises: InputError with one report of all keys that are missing, extra, of a wrong shape, or
        numbers of a wrong kind (floating or not). `where` names the source, as a file's path.
    """
    both = [(key, expected[key], tensors[key]) for key in expected if key in tensors]
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "extra": [key for key in tensors if key not in expected],
        "of wrong shape": [
            f"{key} {tuple(found.shape)} instead of {tuple(wanted.shape)}"
            for key, wanted, found in both
            if found.shape != wanted.shape
        ],
        "of wrong kind": [
            f"{key} {found.dtype} instead of {wanted.dtype}"
            for key, wanted, found in both
            if found.is_floating_point() != wanted.is_floating_point()
        ],
    }
    found = [f"{len(keys)} {kind} ({_shown(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise InputError(f"{where} does not fit the model: {'; '.join(found)}")


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Make `tensors` the parameters and buffers of a module, whose keys and shapes they must match.

    The module takes the tensors themselves, with their dtype and device, so it may be built on the
    meta device; convert it afterwards. Read the file again to load it into a second module.

    Raises: InputError, see `check_fit`.
    """
    check_fit(module.state_dict(), tensors, where)
    module.load_state_dict(tensors, strict=True, assign=True)


def copy_tensors(held: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file into those of the same names and shapes, which keep their dtype.

    What is read of a mapped file counts as memory of this process; here each tensor's share is
    given back once it is copied, so that a file takes no memory beside its copy.

    Raises: InputError, see `check_fit`.
    """
    tensors = read_tensors(path)
    check_fit(held, tensors, str(path))
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(tensors[name])
            _give_back(tensors[name])


def _give_back(tensor: Tensor) -> None:
    """Let the system keep what was read of a mapped file; it is there again when it is used."""
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT)


def read_metadata(path: Path) -> dict[str, str]:
    """The notes in the header of a safetensors file; none for a file of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError:
        return {}


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, bit for bit; tied ones are written one by one.

    Args:
        metadata: notes for the header, see `read_metadata`.
    Raises: InputError if `path` cannot be written; an earlier file there is then intact.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        _write(
            tensors, file, {"format": "pt", **(metadata or {})}
        )  # other readers expect the first


def _write(tensors: Mapping[str, Tensor], file: BinaryIO, metadata: Mapping[str, str]) -> None:
    """Write one tensor after another. safetensors' own writer takes them all in the file's memory
    layout at once, which for the moments of a large network is a second copy.
    """
    # Larger numbers first, so that all lie at multiples of their size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise InputError(
                f"{name} is {tensor.dtype}, expected one of {_shown(map(str, DTYPE_NAMES), 12)}"
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = [*tensor.shape], DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        plain = tensors[name].detach().cpu().contiguous()
        file.write(plain.flatten().view(torch.uint8).numpy())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and every bit of the values."""
    total = hasher(16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        total.update(flat.numpy())
    return total.hexdigest()
