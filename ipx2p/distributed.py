"""Several processes of one run, started by `torchrun` or `spread`, and how they agree (layer 0).

Gradients travel over NCCL on CUDA and over gloo on the CPU. Small messages between the processes
(agreement, scores, errors) always go over gloo, from CPU tensors, so that no device waits.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ipx2p.errors import BAD_INPUT, ERROR, InputError

# How long a process waits for the others. Validation and encoding are divided evenly, so this
# allows for machines of different speed, not for work of a single process.
TIMEOUT = timedelta(minutes=30)
# Between looks at other processes; how long each may take to notice that another one has ended.
POLL_S, LAST_WORDS_S = 0.05, 15.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Processes of one machine find one another without its name, which may be that of no address.
THIS_MACHINE, LOOPBACK = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"
# How gloo and NCCL report that another process has ended.
CLOSED = ("closed by peer", "Connection reset", "Broken pipe", "remote process exited")
LOST = "another process of this run has ended, see its message"


class ProcessLost(InputError):
    """Another process of the run has ended; its own message says why."""


@dataclass(frozen=True)
class World:
    """The processes of a run. One process alone is a world of size 1, without a process group.

    rank: 0..size - 1, over all machines. local_rank: on this machine, also the index of its GPU.
    local_size: the number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def print(self, *values: object) -> None:
        """Print once per run, not once per process."""
        if self.is_main:
            print(*values, flush=True)

    def share(self, items: Sequence) -> Sequence:
        """This process's part of a list: every size-th item from its rank on."""
        return items[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on every process; they are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def merge(self, values: Sequence) -> list:
        """The inverse of `share`: every process's results, in the order of the whole list."""
        parts = self.gather([*values])
        merged: list = [None] * sum(len(part) for part in parts)
        for rank, part in enumerate(parts):
            merged[rank :: self.size] = part
        return merged

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them wait for one another."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None)

    def check_same(self, what: str, value: str) -> None:
        """Raise InputError on every process unless all have the same value."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(
                    f"{what} differs between processes: rank 0 has {values[0]}, rank {rank} has "
                    f"{other}: start all of them with the same files and settings"
                )

    def check_shared(self, folder: Path, key: str) -> None:
        """Raise InputError unless all processes see what the first one writes to a folder."""
        if self.size == 1:
            return
        token = folder / f".shared_{secrets.token_hex(8)}"
        token = self.gather(token)[0]
        if self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        self.barrier()
        seen = self.gather(token.exists())
        if self.is_main:
            token.unlink()
        if not all(seen):
            raise InputError(
                f"{key} is {folder}, which rank {seen.index(False)} does not share with rank 0: "
                "choose a folder that all machines share"
            )

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes, on its device; the host does not wait for it."""
        if self.size > 1:
            value = value / self.size
            dist.all_reduce(value)
        return value


def end_with_parent() -> None:
    """Ask for a SIGTERM to this process when the one that started it dies for any reason.

    Otherwise a killed `torchrun` leaves its processes behind, training in the folder that the next
    start of the command needs.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def count_cores() -> int:
    """The CPU cores that this process may use."""
    can_ask = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1


@contextmanager
def spread(command: Sequence[str], count: int) -> Iterator[None]:
    """Run what is inside in `count` processes of this machine, as `torchrun` would.

    This one is rank 0, the others run `command`, which has to lead to the same place; they share
    the cores. Only rank 0 reports errors. Under torchrun nothing is started.

    Raises: InputError in place of `ProcessLost`, with what the lost process said.
    """
    if count == 1 or "RANK" in os.environ:
        yield
        return
    with socket.create_server((THIS_MACHINE, 0)) as free:
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // count))
    places = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(places)}
    shared = {"MASTER_ADDR": THIS_MACHINE, "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared["GLOO_SOCKET_IFNAME"] = LOOPBACK
    first, *ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    with ExitStack() as opened:
        others = []
        for rank in ranks:
            said = opened.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            options = {"stdin": subprocess.DEVNULL, "preexec_fn": end_with_parent}
            other = subprocess.Popen(command, env=environment | rank, stderr=said, **options)
            opened.callback(other.wait)
            opened.callback(other.kill)  # before the wait; it may be waiting for this process
            others.append((other, said))
        opened.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(int(threads))
        os.environ |= first
        for name in first:
            opened.callback(os.environ.pop, name)
        try:
            with _watching(others):
                yield
        except ProcessLost:
            _raise_last_words(others)
            raise
        _raise_last_words(others)


@contextmanager
def _watching(others: Sequence[tuple[subprocess.Popen, IO[str]]]) -> Iterator[None]:
    """End this process if another one has failed and this one does not notice: until all have met,
    it waits for them where no exception reaches it."""
    is_over = threading.Event()

    def watch() -> None:
        while not any(other.poll() for other, _ in others):
            if is_over.wait(POLL_S):
                return
        if is_over.wait(LAST_WORDS_S):
            return
        try:
            _raise_last_words(others)
            raise ProcessLost(LOST)
        except InputError as error:
            print(f"{ERROR}{error}", file=sys.stderr, flush=True)
        os._exit(BAD_INPUT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _raise_last_words(others: Sequence[tuple[subprocess.Popen, IO[str]]]) -> None:
    """Wait for processes to end; raise InputError with what the first that failed said."""
    until = time.monotonic() + LAST_WORDS_S
    while time.monotonic() < until and any(other.poll() is None for other, _ in others):
        time.sleep(POLL_S)
    for rank, (other, said) in enumerate(others, 1):
        said.seek(0)
        words = said.read().strip()
        if not other.returncode or words.endswith(LOST):
            continue
        _, is_bad_input, last = words.rpartition(ERROR)
        if is_bad_input and "\n" not in last:
            raise InputError(last)
        if words:
            print(words, file=sys.stderr)
        raise InputError(f"rank {rank} ended with exit code {other.returncode}")


def _read_environment() -> World:
    names = {"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": None}
    values = {name: os.environ.get(name, default) for name, default in names.items()}
    values["LOCAL_WORLD_SIZE"] = values["LOCAL_WORLD_SIZE"] or values["WORLD_SIZE"]
    with suppress(TypeError, ValueError):
        world = World(*(int(value) for value in values.values()))
        if 0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size:
            return world
    raise InputError(
        f"the environment has RANK, but these numbers do not make sense: {values}; start with "
        "torchrun, or set them all"
    )


def _open_store(world: World) -> dist.Store:
    """The store in which the processes find one another.

    On one machine `torchrun --max-restarts` keeps it from one attempt to the next, where addresses
    of ended processes must not be found. On several machines each attempt has its own.
    """
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))
    if world.local_size < world.size:
        return store
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


@contextmanager
def open_world(*, cuda: bool, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """The world that `torchrun` describes in the environment, or this process alone.

    Inside another one it is that one, so that a command may call what has a world of its own.

    Args:
        cuda: whether each process has a GPU of its own.
        timeout: how long a process waits for the others.

    Raises: InputError if the processes cannot find one another, or another process has ended. An
        InputError from inside gets the rank in front.
    """
    if "RANK" not in os.environ:
        yield World()
        return
    world = _read_environment()
    if dist.is_initialized():
        yield world
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if cuda:
        if world.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {world.rank}: there is no GPU {world.local_rank}: start at most "
                f"{torch.cuda.device_count()} processes on this machine"
            )
        torch.cuda.set_device(world.local_rank)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_open_store(world),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of torchrun cannot reach one another: {error}") from error
    try:
        yield world
    except InputError as error:
        raise InputError(f"rank {world.rank}: {error}") from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in CLOSED):
            raise
        raise ProcessLost(f"rank {world.rank}: {LOST}") from error
    dist.destroy_process_group()  # only after success: a failed process must not wait here
