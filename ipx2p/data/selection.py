"""Which pairs are trained on, and with which sentences (layer 2).

Both depend on what a pair is, never on its place in a list or on the seed of a run. So runs on 10 %
and on 30 % of the pairs can be compared: the 10 % are among the 30 %.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ipx2p.data.instructions import bank, has_bank, read_bank
from ipx2p.data.manifest import hash64
from ipx2p.data.pairs import Cut, Pairs
from ipx2p.errors import InputError, suggestion


class Subset(Pairs):
    """Some of the pairs, in the order of their numbers."""

    def __init__(self, pairs: Pairs, items: np.ndarray) -> None:
        self.pairs = pairs
        self.items = np.sort(items)

    def number(self, item: int) -> int:
        """Which of the original pairs it is."""
        return int(self.items[item])

    def __len__(self) -> int:
        return len(self.items)

    def task(self, item: int) -> str:
        return self.pairs.task(self.number(item))

    def instructions(self, item: int) -> Sequence[str]:
        return self.pairs.instructions(self.number(item))

    def pictures(self, item: int, cut: Cut, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.pairs.pictures(self.number(item), cut, generator)

    def files(self, item: int) -> Sequence[Path]:
        return self.pairs.files(self.number(item))

    def describe(self, item: int) -> str:
        return self.pairs.describe(self.number(item))

    def by_task(self) -> dict[str, np.ndarray]:
        taken = np.zeros(len(self.pairs), bool)
        taken[self.items] = True
        found = {
            task: np.searchsorted(self.items, items[taken[items]])
            for task, items in self.pairs.by_task().items()
        }
        return {task: items for task, items in found.items() if len(items)}

    def digests(self) -> np.ndarray:
        return self.pairs.digests()[self.items]

    def sentence_digests(self) -> np.ndarray:
        return self.pairs.sentence_digests()[self.items]


class Worded(Subset):
    """All of the pairs, with other sentences.

    Args:
        policy: of `POLICIES`. per_step: all of a pair's sentences, of which each visit draws one.
            per_pair: one of them, the same in every run. fixed: the first of its task's bank.
        banks: sentences that replace those of the pairs of a task.
    """

    def __init__(self, pairs: Pairs, policy: str, banks: Mapping[str, Sequence[str]]) -> None:
        super().__init__(pairs, np.arange(len(pairs)))
        self.policy = policy
        self.banks = dict(banks)
        if policy == "fixed":
            self.banks = {task: self._only(task) for task in pairs.by_task()}

    def instructions(self, item: int) -> Sequence[str]:
        sentences = self.banks.get(self.task(item)) or self.pairs.instructions(item)
        if self.policy == "per_pair":
            drawn = hash64(["sentence", self.describe(item)])
            return (sentences[int.from_bytes(drawn, "little") % len(sentences)],)
        return sentences

    def sentence_digests(self) -> np.ndarray:
        """A hash of each pair's instructions before the policy chooses, (N,) uint64."""
        digests = self.pairs.sentence_digests().copy()
        for task, items in self.by_task().items():
            if task in self.banks:
                [digests[items]] = np.frombuffer(hash64(self.banks[task]), np.uint64)
        return digests

    def _only(self, task: str) -> tuple[str]:
        if task not in self.banks and not has_bank(task):
            raise InputError(
                f"data.instructions is fixed, but task {task!r} has no bank of sentences: set "
                f"data.banks.{task} to a text file, whose first line is the sentence"
            )
        sentences = self.banks.get(task) or bank(task)
        return (sentences[0],)


def leave_out(pairs: Pairs, tasks: Collection[str]) -> Pairs:
    """The pairs of all other tasks.

    Raises: InputError for a task that no pair has, and if no pair is left.
    """
    by_task = pairs.by_task()
    _check_known(tasks, by_task, "data.holdout_tasks")
    kept = [items for task, items in by_task.items() if task not in tasks]
    if not kept:
        raise InputError(
            f"data.holdout_tasks names all tasks, {', '.join(by_task)}: none is left to train on"
        )
    return Subset(pairs, np.concatenate(kept)) if tasks else pairs


def take_fraction(pairs: Pairs, fraction: float) -> Pairs:
    """A share of each task's pairs, rounded, at least one; a larger share includes the smaller."""
    if fraction == 1:
        return pairs
    # Pairs of the same pictures may differ in their sentences.
    order = np.lexsort((pairs.sentence_digests(), pairs.digests()))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    taken = []
    for items in pairs.by_task().values():
        count = max(1, int(fraction * len(items) + 0.5))
        taken.append(items[np.argsort(place[items])[:count]])
    return Subset(pairs, np.concatenate(taken))


def open_banks(banks: Mapping[str, str], tasks: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The sentences for each task that `banks` names a bank or a text file for.

    Raises: InputError for a task that no pair has, and for a file that is not a bank.
    """
    _check_known(banks, tasks, "data.banks")
    return {
        task: bank(source) if has_bank(source) else read_bank(source)
        for task, source in banks.items()
    }


def _check_known(tasks: Iterable[str], known: Collection[str], where: str) -> None:
    for task in tasks:
        if task not in known:
            near = suggestion(task, sorted(known))
            raise InputError(f"{where}: no pair has task {task!r}; {near}")
