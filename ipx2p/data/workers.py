"""Batches read ahead by worker processes (layer 2)."""

import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ipx2p.errors import InputError

# Workers pass batches through sockets below the temporary folder. A socket's name has at most 107
# bytes: with a longer one, batches would be lost and the process would wait forever.
MAX_TEMP_PATH = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")


def _collate(collate: Callable, samples: Sequence) -> Any:
    """The batch that a stream's own collation makes, or the first error among the samples."""
    errors = [sample for sample in samples if isinstance(sample, InputError)]
    return errors[0] if errors else collate(samples)


def micro_batches(
    stream: Dataset, sampler: Iterable[list[int]], *, workers: int, context: str | None = None
) -> Generator:
    """The micro-batches of a sampler, read ahead by worker processes; `close` ends them.

    Args:
        stream: returns a sample by index, or an InputError; its `collate` makes batches.
        context: how workers are started, `spawn` if they use CUDA; None: the system's default.
    Raises: InputError for a picture that cannot be used, when its batch is due.
    """
    if workers and len(os.fsencode(tempfile.gettempdir())) > MAX_TEMP_PATH:
        raise InputError(
            f"data workers cannot pass batches below {tempfile.gettempdir()}, a path of more than "
            f"{MAX_TEMP_PATH} bytes: set TMPDIR to a shorter one"
        )
    loader = DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=partial(_collate, stream.collate),
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
            # A pending exception keeps the iterator and its workers alive, and the process would
            # wait for them forever, since they ignore signals.
            iterator._shutdown_workers()


class _Results(Dataset):
    """What a function returns for each of many items, or the InputError that it raises."""

    def __init__(self, function: Callable, items: Sequence) -> None:
        self.function = function
        self.items = items

    def __getitem__(self, place: int) -> Any:
        try:
            return self.function(self.items[place])
        except InputError as error:
            return error

    @staticmethod
    def collate(results: Sequence) -> Sequence:
        return results


def run_all(
    function: Callable,
    items: Sequence,
    *,
    workers: int,
    chunk: int = 16,
    about: str | None = None,
    context: str | None = None,
) -> Generator:
    """What a function returns for each item, in order, computed by worker processes.

    Args:
        chunk: how many items a worker takes at a time.
        about: title of a progress bar.
        context: as in `micro_batches`.
    Raises: InputError if the function does, when its item is due.
    """
    batches = [range(at, min(at + chunk, len(items))) for at in range(0, len(items), chunk)]
    stream = _Results(function, items)
    with (
        closing(micro_batches(stream, batches, workers=workers, context=context)) as results,
        tqdm(total=len(items), desc=about, leave=False, disable=about is None) as bar,
    ):
        for batch in results:
            yield from batch
            bar.update(len(batch))


def _ignore_signals(worker: int) -> None:
    """A signal to the group is meant for the trainer, which needs its workers to end the step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
