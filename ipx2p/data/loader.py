"""The endless stream of training samples, addressed by a global index (layer 2).

Sample i is the same whatever process draws it and whenever: its place in the shuffle, its cut and
its degradation come from generators keyed by i. So a resumed run continues the stream exactly.
"""

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ipx2p.data.pairs import Cut, EditPair, Pairs, random_geometry
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


@dataclass(frozen=True)
class Framing:
    """How training takes squares out of pictures.

    resolution: their side in pixels. max_zoom: they are up to this much smaller than the picture's
    short side. flip: whether half of them are mirrored. draws: how many fixed cuts (and
    degradations) each pair has, visited in turn; None draws new ones at each visit.
    """

    resolution: int
    max_zoom: float = 1.0
    flip: bool = True
    draws: int | None = None

    def cut(self, draws: torch.Generator, *, flip: bool) -> Cut:
        """What to take of a picture, drawn from a generator; `flip` allows mirroring."""
        return lambda size: random_geometry(
            size, self.resolution, draws, max_zoom=self.max_zoom, flip=flip and self.flip
        )

    def fixed_pictures(
        self, pairs: Pairs, item: int, draw: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Source and target of one of the fixed draws of a pair, (3, H, W) in [0, 1], not mirrored.

        The draw hangs on what the pair is, not on its place among the others.
        """
        draws = generator(seed, f"draw {pairs.describe(item)}", draw)
        return pairs.pictures(item, self.cut(draws, flip=False), draws)


@dataclass(frozen=True)
class Visit:
    """What sample `index` of the stream shows: a pair, one of its fixed draws, mirrored or not."""

    index: int
    item: int
    draw: int
    mirrored: bool
    instruction: str


class Visits:
    """The order of the training samples: epochs of `len(pairs)`, each shuffled in its own way."""

    def __init__(self, pairs: Pairs, framing: Framing, *, seed: int) -> None:
        self.pairs = pairs
        self.framing = framing
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def item(self, index: int) -> int:
        """Which pair sample `index` shows."""
        epoch, place = divmod(index, len(self.pairs))
        if epoch != self._epoch:
            order = generator(self.seed, "shuffle", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.pairs), generator=order)
        return int(self._order[place])

    def __getitem__(self, index: int) -> Visit:
        """What sample `index` shows, for a stream of fixed draws."""
        item = self.item(index)
        draw = index // len(self.pairs) % (self.framing.draws or 1)
        draws = generator(self.seed, "data", index)
        # The same draws as those of a cut at each visit, of which the mirroring remains.
        mirrored = random_geometry((1, 1), 1, draws, flip=self.framing.flip).flip
        return Visit(index, item, draw, mirrored, self.pairs.instruction(item, draws))


class SampleStream(Dataset):
    """Training sample i for any i >= 0, as pictures."""

    def __init__(self, pairs: Pairs, framing: Framing, *, seed: int) -> None:
        self.pairs = pairs
        self.framing = framing
        self.seed = seed
        self.visits = Visits(pairs, framing, seed=seed)

    def __getitem__(self, index: int) -> tuple[int, EditPair] | InputError:
        """The sample; a bad picture is returned as the error it is, for `micro_batches` to raise:
        raised in a worker it would arrive wrapped in a traceback."""
        try:
            return index, self._fixed(index) if self.framing.draws else self._drawn(index)
        except InputError as error:
            return error

    def _drawn(self, index: int) -> EditPair:
        draws = generator(self.seed, "data", index)
        return self.pairs.get(self.visits.item(index), self.framing.cut(draws, flip=True), draws)

    def _fixed(self, index: int) -> EditPair:
        visit = self.visits[index]
        pictures = self.framing.fixed_pictures(self.pairs, visit.item, visit.draw, self.seed)
        if visit.mirrored:
            pictures = [pixels01.flip(-1) for pixels01 in pictures]
        return EditPair(*pictures, visit.instruction, self.pairs.task(visit.item))

    @staticmethod
    def collate(samples: Sequence[tuple[int, EditPair]]) -> Batch:
        """Samples -> a batch."""
        indices, pairs = zip(*samples, strict=True)
        return Batch(
            source_pixels=pixels_from_pixels01(torch.stack([p.source_pixels01 for p in pairs])),
            target_pixels=pixels_from_pixels01(torch.stack([p.target_pixels01 for p in pairs])),
            instructions=[pair.instruction for pair in pairs],
            tasks=[pair.task for pair in pairs],
            indices=[*indices],
        )


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
