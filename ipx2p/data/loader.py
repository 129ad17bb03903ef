"""The endless stream of training samples, addressed by a global index (layer 2).

Sample i is the same in any process at any time: its pair, crop and degradation come from generators
keyed by i. So a resumed run continues the stream exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ipx2p.data.order import Mixture, Order, Shuffles
from ipx2p.data.pairs import Cut, EditPair, Geometry, Pairs, random_geometry
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.images import pixels_from_pictures01
from ipx2p.seeds import generator

REPLACEMENTS = 8  # tried for a pair that cannot be used; if all fail, the data are wrong


@dataclass(frozen=True)
class Pinnable:
    """A batch with tensors among its fields."""

    def pin_memory(self) -> "Pinnable":
        """The same batch in page-locked memory, for asynchronous copies; the loader calls it."""
        tensors = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Batch(Pinnable):
    """B samples: pictures (B, 3, H, W) in [-1, 1], sentences, tasks, global indices.

    skipped: what was wrong with pairs that were replaced by others of their task.
    """

    source_pixels: Tensor
    target_pixels: Tensor
    instructions: list[str]
    tasks: list[str]
    indices: list[int]
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Framing:
    """How training crops squares from pictures.

    resolution: their side in pixels. max_zoom: they are up to this much smaller than the picture's
    short side. flip: whether half of them are mirrored. draws: how many fixed crops (and
    degradations) each pair has, visited in turn; None draws new ones at each visit.
    """

    resolution: int
    max_zoom: float = 1.0
    flip: bool = True
    draws: int | None = None

    @property
    def num_draws(self) -> int:
        """How many rows a cache needs for each pair."""
        return self.draws or 1

    def cut(self, draws: torch.Generator, *, flip: bool) -> Cut:
        """A random crop from a generator; `flip` allows mirroring."""
        return lambda size: random_geometry(
            size, self.resolution, draws, max_zoom=self.max_zoom, flip=flip and self.flip
        )

    def fixed_pictures(
        self, pairs: Pairs, item: int, draw: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Source and target of one of the fixed draws of a pair, (3, H, W) in [0, 1], not mirrored.

        The draw depends on the pair itself, not on its place among the others. Without draws only a
        square picture has a fixed crop. Raises: InputError for another one.
        """
        draws = generator(seed, f"draw {pairs.describe(item)}", draw)
        cut = self.cut(draws, flip=False)

        def fixed_cut(size: tuple[int, int]) -> Geometry:
            if not self.draws and size[0] != size[1]:
                raise InputError(
                    f"data.cache: a picture of {size[0]} x {size[1]} gets a new crop at each "
                    "visit, which cannot be cached: set data.draws, how many fixed crops each pair "
                    "gets"
                )
            return cut(size)

        return pairs.pictures(item, fixed_cut, draws)


class Stream(Dataset):
    """The samples of a run: sample i for any i >= 0.

    Args:
        weights: of the tasks, see `Mixture`; None shuffles all pairs together.
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

    def visit(self, index: int, item: int, epoch: int) -> tuple[int, bool, str]:
        """What sample `index` shows of a pair with fixed draws that was shown `epoch` times before:
        the number of the draw, whether it is mirrored, and the sentence."""
        draws = generator(self.seed, "data", index)
        # Drawn like a new crop at each visit, of which only the mirroring is used.
        mirrored = random_geometry((1, 1), 1, draws, flip=self.framing.flip).flip
        return epoch % self.framing.num_draws, mirrored, self.pairs.instruction(item, draws)


class SampleStream(Stream):
    """Samples as pictures.

    Args:
        skip: whether a pair that cannot be used is replaced by another one of its task.
    """

    def __init__(self, pairs: Pairs, framing: Framing, *, skip: bool = False, **how: Any) -> None:
        super().__init__(pairs, framing, **how)
        self.others = pairs.by_task() if skip else None

    def __getitem__(self, index: int) -> tuple[int, EditPair, list[str]] | InputError:
        """The sample, and what was wrong with pairs that were skipped for it.

        Errors are returned for `micro_batches` to raise: workers would wrap them in a traceback.
        """
        item, epoch = self.order(index)
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
        draw, mirrored, instruction = self.visit(index, item, epoch)
        pictures = self.framing.fixed_pictures(self.pairs, item, draw, self.seed)
        if mirrored:
            pictures = [pixels01.flip(-1) for pixels01 in pictures]
        return EditPair(*pictures, instruction, self.pairs.task(item))

    def _another(self, index: int, item: int, attempt: int) -> int:
        """A pair of the same task that depends on the sample alone, as a resumed run needs."""
        items = self.others[self.pairs.task(item)]
        draws = generator(self.seed, f"replacement {attempt}", index)
        return int(items[int(torch.randint(len(items), (), generator=draws))])

    @staticmethod
    def collate(samples: Sequence[tuple[int, EditPair, list[str]]]) -> Batch:
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

    Step k takes the samples from k * batch_size on, in equal slices: the first `accumulate` of them
    go to the first process, and so on.
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
