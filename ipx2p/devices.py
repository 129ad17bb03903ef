"""Devices, precision and memory (layer 0)."""

import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ipx2p.errors import InputError, suggestion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto", index: int = 0) -> torch.device:
    """The device of this name; `auto` is the GPU of this index, or the CPU if there is none.

    Raises: InputError for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # fails on `meta`, which holds no values
    except Exception as error:  # each backend raises its own way when it is absent
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"device {name!r} is not available: {reason}; use auto, cpu, or cuda on a machine "
            "that has one"
        ) from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; `auto` is bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; {suggestion(name, ['auto', *DTYPES])}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; copies from the CPU to a GPU are asynchronous."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def device_name(device: torch.device) -> str:
    """The model of a GPU or CPU, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # Linux; elsewhere there is no such file
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


@contextmanager
def advice_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory, on a GPU or the CPU, into an InputError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        of_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (of_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise InputError(
            f"out of memory on the {'CPU' if of_cpu else 'GPU'}: {advice()}"
        ) from error


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of tensors on a GPU, on the CPU of this process without data workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take without swapping; 0 where that is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(line.split()[1])
    return 0
