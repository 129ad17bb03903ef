"""The endless stream of training samples, addressed by a global index (layer 2).

Sample i is the same whatever process draws it and whenever: its place in the shuffle, its cut and
its degradation come from generators keyed by i. So a resumed run continues the stream exactly.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ipx2p.data.pairs import EditPair, Geometry, Pairs, random_geometry
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.images import pixels_from_pixels01
from ipx2p.seeds import generator


@dataclass(frozen=True)
class Batch:
    """B samples: pictures (B, 3, H, W) in [-1, 1], sentences, tasks, global indices."""

    source_pixels: Tensor
    target_pixels: Tensor
    instructions: list[str]
    tasks: list[str]
    indices: list[int]

    def pin_memory(self) -> "Batch":
        """The same batch where a copy to the GPU need not wait; called by the loader."""
        return replace(
            self,
            source_pixels=self.source_pixels.pin_memory(),
            target_pixels=self.target_pixels.pin_memory(),
        )


class SampleStream(Dataset):
    """Training sample i for any i >= 0: epochs of `len(pairs)` samples, each in its own order."""

    def __init__(
        self, pairs: Pairs, *, seed: int, resolution: int, max_zoom: float, flip: bool
    ) -> None:
        self.pairs = pairs
        self.seed = seed
        self.resolution = resolution
        self.max_zoom = max_zoom
        self.flip = flip
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[int, EditPair] | InputError:
        """The sample; a bad picture is returned as the error it is, for `batches` to raise."""
        draws = generator(self.seed, "data", index)

        def cut(size: tuple[int, int]) -> Geometry:
            return random_geometry(
                size, self.resolution, draws, max_zoom=self.max_zoom, flip=self.flip
            )

        try:
            return index, self.pairs.get(self._item(index), cut, draws)
        except InputError as error:  # raised in a worker it would arrive wrapped in a traceback
            return error

    def _item(self, index: int) -> int:
        epoch, place = divmod(index, len(self.pairs))
        if epoch != self._epoch:
            order = generator(self.seed, "shuffle", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.pairs), generator=order)
        return int(self._order[place])


class StepSampler(Sampler[list[int]]):
    """The global indices of the micro-batches of one process.

    Step k takes the samples k * batch_size and on, whoever computes them: they are dealt in equal
    slices, `accumulate` of them to each process in turn.
    """

    def __init__(
        self, steps: range, batch_size: int, *, accumulate: int = 1, world: World | None = None
    ) -> None:
        world = world or World()
        assert batch_size % (accumulate * world.size) == 0
        self.steps = steps
        self.batch_size = batch_size
        self.slice = batch_size // (accumulate * world.size)
        self.places = range(world.rank * accumulate, (world.rank + 1) * accumulate)

    def __len__(self) -> int:
        return len(self.steps) * len(self.places)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for place in self.places:
                first = step * self.batch_size + place * self.slice
                yield [*range(first, first + self.slice)]


def collate(samples: Sequence[tuple[int, EditPair] | InputError]) -> Batch | InputError:
    """Samples -> a batch, or the first error among them."""
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    indices, pairs = zip(*samples, strict=True)
    return Batch(
        source_pixels=pixels_from_pixels01(torch.stack([p.source_pixels01 for p in pairs])),
        target_pixels=pixels_from_pixels01(torch.stack([p.target_pixels01 for p in pairs])),
        instructions=[pair.instruction for pair in pairs],
        tasks=[pair.task for pair in pairs],
        indices=[*indices],
    )


def micro_batches(stream: Dataset, sampler: StepSampler, *, workers: int) -> Iterator[Batch]:
    """The micro-batches that the sampler names, read ahead by worker processes.

    Raises: InputError for a picture that cannot be used, when its batch is due.
    """
    loader = DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group is for the trainer, which needs its workers to the end
    of the step; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
