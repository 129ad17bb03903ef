"""Batches read ahead by worker processes (layer 2)."""

import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ipx2p.errors import InputError

# Workers pass batches through sockets in a folder of the temporary one; names of sockets have at
# most 107 bytes. With a longer one the batches would be lost and waited for, for ever.
MAX_TEMP_PATH = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")


class _Collate:
    """A stream's own collation, or the first error among the samples."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence) -> Any:
        for sample in samples:
            if isinstance(sample, InputError):
                return sample
        return self.collate(samples)


def micro_batches(
    stream: Dataset, sampler: Iterable[list[int]], *, workers: int, context: str | None = None
) -> Generator:
    """The micro-batches that the sampler names, read ahead by worker processes; `close` ends them.

    Args:
        stream: gives samples by index, or an InputError; its `collate` makes a batch of some.
        context: how workers are started, `spawn` if they are to use CUDA; None: the system's way.

    Raises: InputError for a picture that cannot be used, when its batch is due.
    """
    if workers and len(os.fsencode(tempfile.gettempdir())) > MAX_TEMP_PATH:
        raise InputError(
            f"data workers cannot pass batches on below {tempfile.gettempdir()}, a path of more "
            f"than {MAX_TEMP_PATH} bytes: set TMPDIR to a shorter one"
        )
    loader = DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=_Collate(stream.collate),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
        multiprocessing_context=context if workers else None,
    )
    iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a data worker was killed, which happens when memory runs out: lower data.workers "
            f"({workers}); {error}"
        ) from error
    finally:
        if workers:
            # An exception on its way keeps the iterator alive, and with it its workers, for which
            # the process would then wait for ever: they take no signal.
            iterator._shutdown_workers()


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group is for the trainer, which needs its workers to the end
    of the step; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
