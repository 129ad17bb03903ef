"""The endless stream of training samples, addressed by a global index (layer 2).

Sample i is the same whatever process draws it and whenever: its place in the order, its cut and
its degradation come from generators keyed by i. So a resumed run continues the stream exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ipx2p.data.order import Mixture, Order, Shuffles
from ipx2p.data.pairs import Cut, EditPair, Pairs, random_geometry
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.images import pixels_from_pictures01
from ipx2p.seeds import generator

REPLACEMENTS = 8  # are tried for a pair that cannot be used: more mean that the data are wrong


@dataclass(frozen=True)
class Batch:
    """B samples: pictures (B, 3, H, W) in [-1, 1], sentences, tasks, global indices.

    skipped: what was wrong with pairs that others of the same task stand for.
    """

    source_pixels: Tensor
    target_pixels: Tensor
    instructions: list[str]
    tasks: list[str]
    indices: list[int]
    skipped: list[str] = field(default_factory=list)

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
    """What the samples of a run show.

    Args:
        weights: of the tasks, see `Mixture`; None is one order for all pairs.
    """

    def __init__(
        self,
        pairs: Pairs,
        framing: Framing,
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.pairs = pairs
        self.framing = framing
        self.seed = seed
        self.order: Order = (
            Shuffles(len(pairs), seed=seed, purpose="shuffle")
            if weights is None
            else Mixture(pairs.by_task(), weights, seed=seed)
        )

    def __getitem__(self, index: int) -> Visit:
        """What sample `index` shows, for a stream of fixed draws."""
        return self.of(index, *self.order(index))

    def of(self, index: int, item: int, epoch: int) -> Visit:
        """The same where the pair is given, and how often it was shown before."""
        draw = epoch % (self.framing.draws or 1)
        draws = generator(self.seed, "data", index)
        # The same draws as those of a cut at each visit, of which the mirroring remains.
        mirrored = random_geometry((1, 1), 1, draws, flip=self.framing.flip).flip
        return Visit(index, item, draw, mirrored, self.pairs.instruction(item, draws))


class SampleStream(Dataset):
    """Training sample i for any i >= 0, as pictures.

    Args:
        weights: of the tasks, see `Visits`.
        skip: whether another pair of the same task stands for one that cannot be used.
    """

    def __init__(
        self,
        pairs: Pairs,
        framing: Framing,
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
        skip: bool = False,
    ) -> None:
        self.pairs = pairs
        self.framing = framing
        self.seed = seed
        self.visits = Visits(pairs, framing, seed=seed, weights=weights)
        self.others = pairs.by_task() if skip else None

    def __getitem__(self, index: int) -> tuple[int, EditPair, list[str]] | InputError:
        """The sample, and what was wrong with pairs that were skipped for it.

        A bad picture is returned as the error it is, for `micro_batches` to raise: raised in a
        worker it would arrive wrapped in a traceback.
        """
        item, epoch = self.visits.order(index)
        skipped: list[str] = []
        for attempt in range(1 + (REPLACEMENTS if self.others else 0)):
            if attempt:
                item = self._another(index, item, attempt)
            try:
                return index, self._pair(index, item, epoch), skipped
            except InputError as error:
                skipped.append(str(error))
        if not self.others:
            return InputError(skipped[0])
        return InputError(
            f"{len(skipped)} pairs of task {self.pairs.task(item)!r} drawn in a row cannot be "
            f"used, the last: {skipped[-1]}"
        )

    def _pair(self, index: int, item: int, epoch: int) -> EditPair:
        if not self.framing.draws:
            draws = generator(self.seed, "data", index)
            return self.pairs.get(item, self.framing.cut(draws, flip=True), draws)
        visit = self.visits.of(index, item, epoch)
        pictures = self.framing.fixed_pictures(self.pairs, item, visit.draw, self.seed)
        if visit.mirrored:
            pictures = [pixels01.flip(-1) for pixels01 in pictures]
        return EditPair(*pictures, visit.instruction, self.pairs.task(item))

    def _another(self, index: int, item: int, attempt: int) -> int:
        """A pair of the same task, which hangs on the sample only: a resumed run draws it too."""
        items = self.others[self.pairs.task(item)]
        draws = generator(self.seed, f"replacement {attempt}", index)
        return int(items[int(torch.randint(len(items), (), generator=draws))])

    @staticmethod
    def collate(samples: Sequence[tuple[int, EditPair, list[str]]]) -> Batch:
        """Samples -> a batch."""
        indices, pairs, errors = zip(*samples, strict=True)
        return Batch(
            source_pixels=pixels_from_pictures01([pair.source_pixels01 for pair in pairs]),
            target_pixels=pixels_from_pictures01([pair.target_pixels01 for pair in pairs]),
            instructions=[pair.instruction for pair in pairs],
            tasks=[pair.task for pair in pairs],
            indices=[*indices],
            skipped=[error for found in errors for error in found],
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
