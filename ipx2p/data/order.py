"""Which pair each training sample shows, addressed by a global index (layer 2).

Two orders: epochs of all pairs, in which the share of a task is that of its pairs; and a mixture
with given shares. A mixture puts sample i at u_i = (i * STRIDE + offset) mod 2^64 and divides
0..2^64 into one interval per task. With the golden ratio as stride this sequence (Weyl 1916) fills
every interval as evenly as possible, so the first N samples show a task N * share times to within a
few. The samples of a task before any i are counted exactly, in integers and closed form, so a
resumed run continues the order exactly.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import torch

from ipx2p.seeds import generator

RANGE = 2**64
STRIDE = 11400714819323198485  # 2^64 over the golden ratio, odd
Order = Callable[[int], tuple[int, int]]  # sample -> number of its pair, times shown before


class Shuffles:
    """Epochs of the numbers below `count`, each shuffled differently.

    Args:
        purpose: keys the generators of the shuffles, together with seed and epoch.
    """

    def __init__(self, count: int, *, seed: int, purpose: str) -> None:
        self.count = count
        self.seed = seed
        self.purpose = purpose
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, index: int) -> tuple[int, int]:
        """The number at a place of the endless sequence, and its epoch."""
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            draws = generator(self.seed, self.purpose, epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=draws)
        return int(self._order[place]), epoch


class Mixture:
    """Tasks in given shares; within a task epochs of its pairs, each shuffled differently.

    Args:
        items: the numbers of each task's pairs.
        weights: of the tasks, 0 or more, not all 0; the shares are their ratios.
    """

    def __init__(
        self, items: Mapping[str, np.ndarray], weights: Mapping[str, float], *, seed: int
    ) -> None:
        tasks = sorted(weights)
        self.items = [items[task] for task in tasks]
        self.shuffles = [
            Shuffles(len(items[task]), seed=seed, purpose=f"shuffle {task}") for task in tasks
        ]
        exact = [Fraction(weights[task]) for task in tasks]
        ends = [sum(exact[: 1 + place]) for place in range(len(exact))]
        self.ends = [int(RANGE * end / ends[-1]) for end in ends]  # of the tasks' intervals
        high, low = torch.randint(2**32, (2,), generator=generator(seed, "mixture")).tolist()
        self.offset = (high << 32) + low

    def __call__(self, index: int) -> tuple[int, int]:
        """The pair that sample `index` shows, and how often it was shown before."""
        task = bisect_right(self.ends, (index * STRIDE + self.offset) % RANGE)
        place, epoch = self.shuffles[task](self.count(task, index))
        return int(self.items[task][place]), epoch

    def count(self, task: int, index: int) -> int:
        """How many of the samples before `index` show the task of this number."""
        begin = self.ends[task - 1] if task else 0
        # floor((x - begin) / R) - floor((x - end) / R) is 1 where begin <= x mod R < end, else 0.
        return floor_sum(index, RANGE, STRIDE, self.offset - begin) - floor_sum(
            index, RANGE, STRIDE, self.offset - self.ends[task]
        )


def floor_sum(count: int, modulus: int, stride: int, offset: int) -> int:
    """Sum of floor((stride * i + offset) / modulus) over i = 0..count - 1, exactly.

    Like Euclid's algorithm: whole multiples of the modulus are split off, and the remaining lattice
    points below the line are counted along the other axis. O(log count) steps.
    """
    total = 0
    while count > 0:
        whole, stride = divmod(stride, modulus)
        total += whole * (count * (count - 1) // 2)
        whole, offset = divmod(offset, modulus)
        total += whole * count
        count, offset = divmod(stride * count + offset, modulus)
        modulus, stride = stride, modulus
    return total


def tempered(counts: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Weights n^(1 / temperature) of tasks with n pairs: from proportional, 1, to equal, inf."""
    largest = max(counts.values())
    return {task: (count / largest) ** (1 / temperature) for task, count in counts.items()}
